// Rows of one kind in one allocation, on the CPU or a GPU, addressed by number.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include <ATen/core/Tensor.h>

#include "ops/cache/kv_rows.h"

namespace hadal::engine {

class RowMemory {
 public:
  RowMemory() = default;
  /// `count` zero rows: bytes where `format` packs, else [width] of `dense`. `lazy`: the CPU's
  /// memory is taken when it is first written.
  RowMemory(int64_t count,
            int64_t width,
            const ops::RowFormat& format,
            at::ScalarType dense,
            at::Device device,
            bool lazy = false);

  const at::Tensor& rows() const { return rows_; }  ///< [count, width or bytes]
  const ops::RowFormat& format() const { return format_; }
  int64_t row_bytes() const { return rows_.size(1) * rows_.element_size(); }

  /// The rows' bytes one behind the other; returns the end of `out`. On a GPU the copies are only
  /// under way then, and `out` is pinned memory (DeviceBytes).
  std::byte* read(std::span<const int64_t> numbers, std::byte* out) const;
  /// The inverse; returns the end of what it took. On a GPU `in` is pinned memory, which is read
  /// later.
  const std::byte* write(std::span<const int64_t> numbers, const std::byte* in);
  /// Rows `from` of `source` [n, width], packed on the way where the format says so, become rows
  /// `to`; both [m] I64 on the rows' device; `from` undefined: all rows in order. Errors: on the
  /// CPU Error for values that did not go through the format's round trip.
  void store(const at::Tensor& source, const at::Tensor& from, const at::Tensor& to);
  /// Rows [from, from + count) become rows [to, to + count).
  void copy(int64_t from, int64_t to, int64_t count);

 private:
  std::byte* bytes(int64_t row) const {
    return static_cast<std::byte*>(rows_.mutable_data_ptr()) + row * row_bytes();
  }

  at::Tensor rows_;
  ops::RowFormat format_;
};

/// Bytes on their way from or to the device of a cache, in pinned memory: many copies, one wait.
/// Where the cache is the host's, no more than the caller's own memory.
class DeviceBytes {
 public:
  /// To be filled by read(); wait() then brings them to `out`.
  DeviceBytes(std::span<std::byte> out, at::Device device);
  /// Filled with `in`, for write().
  DeviceBytes(std::span<const std::byte> in, at::Device device);

  std::byte* to_fill() { return pinned_.defined() ? pinned_data() : out_.data(); }
  const std::byte* filled() const { return pinned_.defined() ? pinned_data() : in_.data(); }
  /// Until all copies have ended: before this is gone, and before `out` is read.
  void wait();

 private:
  DeviceBytes(int64_t count, at::Device device);
  std::byte* pinned_data() const {
    return reinterpret_cast<std::byte*>(pinned_.mutable_data_ptr<uint8_t>());
  }
  at::Device device_;
  std::span<std::byte> out_;
  std::span<const std::byte> in_;
  at::Tensor pinned_;  // undefined on the host
};

}  // namespace hadal::engine
