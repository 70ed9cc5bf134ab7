// Operands of the two backward products of `fp8`, rounded to E4M3 with power-of-two scales along
// the dimension that the product sums over (docs/decisions/0033-fp8.md).
//
// One scale s = 2^ceil(log2(amax / 448)) a group, as for activations (round_trip.h), but without
// their floor of 1e-4, below which gradients lie: amax is floored at 448 * 2^-117, so that every
// result is a multiple of 2^-126. Results are values, exact in BF16. A group that holds NaN or
// infinity is NaN throughout, so that a gradient that stopped being finite is seen.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hadal::ops {

/// One scale per `group` consecutive entries of a row; the last group of a row may be short.
///   x  [rows, width] FP32 or BF16; the result has x's dtype and no gradient
at::Tensor e4m3_rows(const at::Tensor& x, int64_t group);

/// One scale per column and group of rows: group i is rows [bounds[i], bounds[i + 1]).
///   x       [rows, width] FP32 or BF16; the result has x's dtype and no gradient
///   bounds  ascending, from 0 to rows
at::Tensor e4m3_columns(const at::Tensor& x, const std::vector<int64_t>& bounds);

namespace reference {
at::Tensor e4m3_rows(const at::Tensor& x, int64_t group);
at::Tensor e4m3_columns(const at::Tensor& x, const std::vector<int64_t>& bounds);
}  // namespace reference

}  // namespace hadal::ops
