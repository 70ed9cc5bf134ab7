// Quantise-dequantise round trips of activations (model.md 14.1 to 14.3), with straight-through
// gradients.
//
// Scales are powers of two (UE8M0) and the element formats have at most four significant bits, so
// the result is exact in BF16: these functions return the rounded values, not codes.
#pragma once

#include "base/fwd.h"
#include "ops/op.h"

namespace hadal::ops {

/// NaN stays NaN where it is; a group with infinity is NaN throughout (on the CPU).
///
/// Q8_g: E4M3 with one scale 2^ceil(log2(amax / 448)) per `group` channels, amax floored at 1e-4.
///   x  [..., dim], dim divisible by group; result has x's dtype
at::Tensor fp8_round_trip(const at::Tensor& x, int64_t group);

/// Q8_g of the first `dim` channels; the rest (a latent's rotary channels) stays.
at::Tensor fp8_round_trip_leading(const at::Tensor& x, int64_t dim, int64_t group);

/// Q4_g: E2M1 with one scale 2^ceil(log2(amax / 6)) per `group` channels, amax floored at 6 *
/// 2^-126.
at::Tensor fp4_round_trip(const at::Tensor& x, int64_t group);

/// Nearest E2M1 value of each entry, ties to the even code, saturating at 6; any float type.
at::Tensor round_to_e2m1(const at::Tensor& x);

namespace reference {
at::Tensor fp8_round_trip(const at::Tensor& x, int64_t group);
at::Tensor fp4_round_trip(const at::Tensor& x, int64_t group);
}  // namespace reference

}  // namespace hadal::ops
