#include "ops/gemm/normalised_input.h"

#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/math.h"
#include "ops/gemm/normalised_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/norm/rms_norm.h"
#include "ops/sm90.h"
#include "ops/tape.h"

namespace hadal::ops {

bool serves_normalised_sm90(const at::Tensor& x,
                            int64_t dim,
                            const at::Tensor& weight,
                            Numerics numerics,
                            OperandKinds kinds) {
  const bool learns = at::GradMode::is_enabled() && weight.requires_grad();
  const bool codes = kinds.codes && numerics == Numerics::kReleased;
  return x.is_cuda() && x.size(0) > 0 && dim % 128 == 0 && dim <= 16384 && !learns &&
         (codes || kinds.bf16) && use_sm90(x);
}

NormalisedRows::NormalisedRows(const at::Tensor& x,
                               const at::Tensor& weight_any,
                               double eps,
                               Numerics numerics,
                               OperandKinds kinds)
    : weight_(fp32_input(weight_any)) {
  const int64_t rows = x.size(0), dim = x.size(-1), groups = ceil_div(rows, sm90::kGroupRows);
  check_shape(weight_any, {dim}, "normalised_input: weight");
  out_ = at::empty({rows, dim}, x.options());
  params = {.x = nullptr,
            .weight = weight_.const_data_ptr<float>(),
            .out = out_.mutable_data_ptr(),
            .rows = rows,
            .dim = dim,
            .eps = static_cast<float>(eps),
            .codes = nullptr,
            .scales = nullptr,
            .operand = nullptr,
            .x_groups = groups};
  if (kinds.codes && numerics == Numerics::kReleased) {
    codes_ = empty_rows_sm90(rows, dim, x.device());
    params.codes = codes_->codes.mutable_data_ptr<uint8_t>();
    params.scales = codes_->scales.mutable_data_ptr<float>();
  }
  if (kinds.bf16) {
    bf16_ = Sm90Rows{
        .codes = at::empty({dim * 2 * groups * sm90::kGroupRows}, x.options().dtype(at::kByte)),
        .scales = {},
        .groups = groups,
        .rows = rows};
    params.operand = bf16_->codes.mutable_data_ptr<uint8_t>();
  }
}

ProductInput NormalisedRows::input(Numerics numerics) && {
  return {std::move(out_), numerics, std::move(codes_), std::move(bf16_)};
}

ProductInput normalised_input(const at::Tensor& x_any,
                              const at::Tensor& weight_any,
                              double eps,
                              Numerics numerics,
                              OperandKinds kinds) {
  if (x_any.dim() != 2 ||
      !serves_normalised_sm90(x_any, x_any.size(-1), weight_any, numerics, kinds)) {
    const auto norm = [eps](const at::Tensor& x, const at::Tensor& w) {
      return rms_norm(x, w, eps);
    };
    return {checkpointed(recorded("norm", norm, x_any, weight_any)), numerics};
  }
  const at::Tensor x = kernel_input(x_any);
  NormalisedRows rows(x, weight_any, eps, numerics, kinds);
  rows.params.x = x.const_data_ptr();
  normalised_sm90(rows.params, current_stream(x));
  return std::move(rows).input(numerics);
}

}  // namespace hadal::ops
