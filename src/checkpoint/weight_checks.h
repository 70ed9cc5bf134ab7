// Whether the values of a checkpoint can be right: every weight is read once.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/tensor_file.h"
#include "checkpoint/official.h"

namespace hadal::checkpoint {

/// What a look at all bytes of a tensor tells.
struct ValueScan {
  bool finite = true;    ///< no NaN, no infinity
  bool zero = true;      ///< nothing but zeros of either sign
  bool constant = true;  ///< the same bytes throughout
};
/// Of contiguous elements; integers other than packed FP4 (kI8, kU8) are always finite.
ValueScan scan_values(const void* data, int64_t num_elements, Dtype dtype);

/// InputErrors name the tensors: NaN or infinity in a weight; expert scales that are all zero
/// beside weights that are not. Warnings name what can hardly be meant: zero matrices, matrices of
/// one value (a router's gate above all), expert scales of one value. At most 20 names of a kind.
void check_weights(const OfficialCheckpoint& checkpoint);

}  // namespace hadal::checkpoint
