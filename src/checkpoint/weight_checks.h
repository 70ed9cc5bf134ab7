// Whether the values of a checkpoint can be right: every weight is read once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/tensor_file.h"
#include "checkpoint/official.h"

namespace hadal::checkpoint {

/// What a look at all bytes of a tensor tells.
struct ValueScan {
  bool finite = true;    ///< no NaN, no infinity
  bool zero = true;      ///< nothing but zeros of either sign
  bool constant = true;  ///< the same bytes throughout
  int64_t num_elements = 0;
};
class PieceScan;

/// Of contiguous elements; integers other than packed FP4 (kI8, kU8) are always finite.
ValueScan scan_values(const void* data, int64_t num_elements, Dtype dtype);

/// Looks at tensors whose bytes come by piece by piece, so that nobody has to read them twice.
class WeightScans {
 public:
  WeightScans();
  ~WeightScans();
  WeightScans(const WeightScans&) = delete;
  WeightScans& operator=(const WeightScans&) = delete;

  /// All bytes of this weight, and of its scale if it is an expert, are going to come by. Not while
  /// look() runs.
  void expect(const std::string& name, const CheckpointTensor& weight);
  /// Bytes that lie at `from` in the mapped file: a multiple of 8 from their tensor's first on, and
  /// as many unless they are its last. Those of others are passed over. From any thread.
  void look(const std::byte* from, std::span<const std::byte> bytes);

  /// What came by; nullopt for what was not expected.
  std::optional<ValueScan> weight(const std::string& name) const;
  std::optional<ValueScan> scale(const std::string& name) const;

 private:
  std::map<const std::byte*, std::unique_ptr<PieceScan>> tensors_;  ///< by their first byte
  std::map<std::string, const PieceScan*> weights_, scales_;
};

/// InputErrors name the tensors: NaN or infinity in a weight; expert scales that are all zero
/// beside weights that are not. Warnings name what can hardly be meant: zero matrices, matrices of
/// one value (a router's gate above all), expert scales of one value. At most 20 names of a kind.
/// What `scans` saw is not read again.
void check_weights(const OfficialCheckpoint& checkpoint, const WeightScans* scans = nullptr);

}  // namespace hadal::checkpoint
