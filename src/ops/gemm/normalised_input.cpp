#include "ops/gemm/normalised_input.h"

#include <utility>

#include <ATen/ATen.h>

#include "base/math.h"
#include "ops/gemm/normalised_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/norm/rms_norm.h"
#include "ops/sm90.h"

namespace hadal::ops {

ProductInput normalised_input(const at::Tensor& x_any,
                              const at::Tensor& weight_any,
                              double eps,
                              Numerics numerics,
                              OperandKinds kinds) {
  const bool learns = at::GradMode::is_enabled() && weight_any.requires_grad();
  const int64_t rows = x_any.size(0), dim = x_any.size(-1);
  const bool codes = kinds.codes && numerics == Numerics::kReleased;
  if (x_any.dim() != 2 || rows == 0 || dim % 128 != 0 || dim > 16384 || learns ||
      !(codes || kinds.bf16) || !x_any.is_cuda() || !use_sm90(x_any)) {
    return {rms_norm(x_any, weight_any, eps), numerics};
  }
  check_shape(weight_any, {dim}, "normalised_input: weight");
  const at::Tensor x = kernel_input(x_any), weight = fp32_input(weight_any);
  at::Tensor out = at::empty_like(x);
  const int64_t x_groups = ceil_div(rows, sm90::kGroupRows);
  std::optional<Sm90Rows> quantised, low;
  if (codes) quantised = empty_rows_sm90(rows, dim, x.device());
  if (kinds.bf16) {
    low = Sm90Rows{
        .codes = at::empty({dim * 2 * x_groups * sm90::kGroupRows}, x.options().dtype(at::kByte)),
        .scales = {},
        .groups = x_groups,
        .rows = rows};
  }
  normalised_sm90({.x = x.const_data_ptr(),
                   .weight = weight.const_data_ptr<float>(),
                   .out = out.mutable_data_ptr(),
                   .rows = rows,
                   .dim = dim,
                   .eps = static_cast<float>(eps),
                   .codes = quantised ? quantised->codes.mutable_data_ptr<uint8_t>() : nullptr,
                   .scales = quantised ? quantised->scales.mutable_data_ptr<float>() : nullptr,
                   .operand = low ? low->codes.mutable_data_ptr<uint8_t>() : nullptr,
                   .x_groups = x_groups},
                  current_stream(x));
  return {std::move(out), numerics, std::move(quantised), std::move(low)};
}

}  // namespace hadal::ops
