#include "ops/attention/heads.h"

#include <ATen/ATen.h>

#include "base/math.h"
#include "ops/attention/heads_sm90.h"
#include "ops/attention/rope.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/gemm/sm90_products.h"
#include "ops/norm/rms_norm.h"
#include "ops/sm90.h"

namespace hadal::ops {
namespace {

constexpr int64_t kRotary = 64;

bool serves_heads_sm90(const at::Tensor& x, const at::Tensor& cos_sin) {
  const int64_t width = x.size(2);
  return cos_sin.size(1) * 2 == kRotary &&
         (width == 64 || width == 128 || width == 256 || width == 512) && use_sm90(x);
}

}  // namespace

at::Tensor norm_rotate_heads(const at::Tensor& q_any,
                             double eps,
                             Numerics numerics,
                             const at::Tensor& cos_sin_any) {
  check_shape(q_any, {-1, -1, -1}, "norm_rotate_heads: q");
  // The norm of other numerics keeps more bits.
  if (numerics != Numerics::kReleased || !serves_heads_sm90(q_any, cos_sin_any))
    return rope(head_norm(q_any, eps, numerics), cos_sin_any);
  const at::Tensor q = kernel_input(q_any), cos_sin = kernel_input(cos_sin_any);
  at::Tensor out = at::empty_like(q);
  run_sm90(q, head_rows_sm90, head_rows_twin,
           {.x = bf16_data(q),
            .cos_sin = cos_sin.const_data_ptr<float>(),
            .out = mutable_bf16_data(out),
            .tokens = q.size(0),
            .heads = q.size(1),
            .width = q.size(2),
            .eps = static_cast<float>(eps),
            .norm = true,
            .inverse = false});
  return out;
}

at::Tensor rotated_group_linear(const at::Tensor& x_any,
                                const at::Tensor& cos_sin_any,
                                const Weight& w) {
  check_shape(x_any, {-1, -1, -1}, "rotated_group_linear: x");
  const int64_t tokens = x_any.size(0), heads = x_any.size(1), width = x_any.size(2);
  const bool whole = heads % w.matrices() == 0 && heads / w.matrices() * width == w.in();
  if (!whole || w.form() != WeightForm::kSm90 || !serves_groups_sm90(w.sm90()) ||
      w.in() % 64 != 0 || tokens == 0 || !serves_heads_sm90(x_any, cos_sin_any)) {
    return group_linear(rope(x_any, cos_sin_any, /*inverse=*/true)
                            .reshape({tokens, w.matrices(), heads * width / w.matrices()}),
                        w);
  }
  const at::Tensor x = kernel_input(x_any), cos_sin = kernel_input(cos_sin_any);
  const int64_t x_groups = ceil_div(tokens, sm90::kGroupRows);
  const Sm90Rows rows{.codes = at::empty({x_groups * sm90::kGroupRows * heads * width * 2},
                                         x.options().dtype(at::kByte)),
                      .scales = {},
                      .groups = x_groups,
                      .rows = tokens};
  run_sm90(x, head_operand_sm90, head_operand_twin,
           {.x = bf16_data(x),
            .cos_sin = cos_sin.const_data_ptr<float>(),
            .operand = rows.codes.mutable_data_ptr<uint8_t>(),
            .tokens = tokens,
            .heads = heads,
            .width = width,
            .groups = w.matrices(),
            .x_groups = x_groups});
  return group_linear_sm90(rows, w.sm90());
}

}  // namespace hadal::ops
