// RMSNorm over the last dimension and the weightless norm of query heads (model.md 4).
#pragma once

#include "base/fwd.h"
#include "ops/op.h"

namespace hadal::ops {

/// y = weight * (x * rsqrt(mean(x^2) + eps)), FP32 inside, one rounding to x's dtype.
///   x       [..., dim]  any float type
///   weight  [dim]       any float type
///   places  [rows] I64 on the CPU, not descending: where rows stand in the sum of the weight's
///           gradient (sum_tree.h), which on a GPU has an order of its own; undefined: 0, 1, ...
at::Tensor rms_norm(const at::Tensor& x,
                    const at::Tensor& weight,
                    double eps,
                    const at::Tensor& places = {});

/// Per-head norm without weight. In `released` every intermediate is rounded to BF16 as the
/// official expression does (q2 = bf16(q*q), s = bf16(mean q2), r = bf16(rsqrt(bf16(s + eps))), y =
/// bf16(q*r)); otherwise FP32 inside.
///   x  [tokens, heads, head_dim]
at::Tensor head_norm(const at::Tensor& x, double eps, Numerics numerics);

namespace reference {
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
at::Tensor head_norm(const at::Tensor& x, double eps, Numerics numerics);
}  // namespace reference

}  // namespace hadal::ops
