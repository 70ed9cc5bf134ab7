// Heads of attention before and after it: what stands between the products and the fold.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/gemm/weight.h"

namespace hadal::ops {

/// rope(head_norm(q)): the per-head norm of queries and their rotation; q [tokens, heads, width],
/// cos_sin [tokens, rotary / 2, 2].
at::Tensor norm_rotate_heads(const at::Tensor& q,
                             double eps,
                             Numerics numerics,
                             const at::Tensor& cos_sin);

/// group_linear of results that are rotated back: x [tokens, heads, width], of which group g of w
/// takes its share of the heads; result [tokens, groups, out].
at::Tensor rotated_group_linear(const at::Tensor& x, const at::Tensor& cos_sin, const Weight& w);

}  // namespace hadal::ops
