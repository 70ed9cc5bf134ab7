// Memory for the tables of a step: each table stays at its address from step to step, so that what
// was recorded for one step finds the tables of the next; all of a step reach the device in one
// copy.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

namespace hadal::ops {

class TableMemory {
 public:
  /// What a table is (a text of static storage), and for which ratio or ring size; 0 where there is
  /// but one.
  using Name = std::pair<std::string_view, int64_t>;

  explicit TableMemory(at::Device device) : device_(device) {}

  at::Device device() const { return device_; }
  /// A step begins: tables are written anew.
  void begin();
  /// The values as a tensor [n] of `type` (I32 or I64) on the device, there after upload(), until
  /// the next begin(). Errors: Error for a value that `type` cannot hold.
  at::Tensor place(const Name& name, std::span<const int64_t> values, at::ScalarType type);
  /// One copy, on the current stream; nothing where the tables are the host's own.
  void upload();
  /// A table of its own, wherever it is: for steps that are not recorded.
  static at::Tensor make(std::span<const int64_t> values, at::ScalarType type, at::Device device);
  /// How often a table's address has changed: it outgrew its room.
  int64_t moves() const { return moves_; }
  int64_t bytes() const;

 private:
  struct Table {
    size_t chunk = 0;
    int64_t offset = 0, room = 0;  // bytes
    at::Tensor view;               // of the latest length
  };
  struct Chunk {
    at::Tensor host, device;  // bytes; the same on the CPU
    int64_t used = 0;
  };
  Chunk make_chunk(int64_t bytes) const;
  /// Gives every table a place in one chunk.
  void settle();

  at::Device device_;
  std::map<Name, Table> tables_;
  std::vector<Chunk> chunks_;
  std::optional<c10::Event> uploaded_;  // the device has read what the host may now overwrite
  int64_t moves_ = 0;
};

}  // namespace hadal::ops
