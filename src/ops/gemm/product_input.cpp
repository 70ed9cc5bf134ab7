#include "ops/gemm/product_input.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "ops/gemm/linear_sm90.h"
#include "ops/op.h"
#include "ops/sm90.h"
#include "ops/tape.h"

namespace hadal::ops {

const at::Tensor& ProductInput::rounded(GemmRole role) const {
  if (!quantises_input(role, numerics_)) return x_;
  if (!rounded_.defined()) {
    const auto round = [role, numerics = numerics_](const at::Tensor& x) {
      return quantise_input(x, role, numerics);
    };
    rounded_ = checkpointed(recorded("rounded", round, x_));
  }
  return rounded_;
}

ProductInput ProductInput::detach() const {
  ProductInput result = *this;
  result.x_ = x_.detach();
  if (rounded_.defined()) result.rounded_ = rounded_.detach();
  return result;
}

const Sm90Rows& ProductInput::codes() const {
  if (!codes_) codes_ = operand_rows_sm90(kernel_input(x_), {}, x_.size(0), /*rounds=*/true);
  return *codes_;
}

const Sm90Rows& ProductInput::bf16_operand() const {
  if (!bf16_operand_)
    bf16_operand_ = operand_rows_sm90(kernel_input(x_), {}, x_.size(0), /*rounds=*/false);
  return *bf16_operand_;
}

namespace {

/// Whether a Hopper kernel multiplies these rows as an operand: of codes, or of BF16.
enum class OperandKind { kNone, kCodes, kBf16 };

OperandKind operand_kind(const ProductInput& x, const Weight& w, GemmRole role) {
  if (!use_sm90(x.x())) return OperandKind::kNone;
  if (w.form() != WeightForm::kSm90 || !serves_linear_sm90(w.sm90(), role))
    return OperandKind::kNone;
  if (w.sm90().format == WeightFormat::kBf16) return OperandKind::kBf16;
  const bool codes = !w.sm90().widened && x.numerics() == Numerics::kReleased;
  return codes ? OperandKind::kCodes : OperandKind::kNone;
}

}  // namespace

void make_operand(const ProductInput& x, const Weight& w, GemmRole role) {
  switch (operand_kind(x, w, role)) {
    case OperandKind::kCodes:
      x.codes();
      return;
    case OperandKind::kBf16:
      x.bf16_operand();
      return;
    case OperandKind::kNone:
      x.rounded(role);
      return;
  }
}

at::Tensor linear(const ProductInput& x, const Weight& w, GemmRole role) {
  switch (operand_kind(x, w, role)) {
    case OperandKind::kCodes:
      return linear_sm90(x.codes(), w.sm90(), role);
    case OperandKind::kBf16:
      return linear_sm90(x.bf16_operand(), w.sm90(), role);
    case OperandKind::kNone:
      break;
  }
  return linear(x.rounded(role), w, role);
}

std::vector<at::Tensor> linear(const ProductInput& x, const std::vector<Factor>& factors) {
  const auto all = [&](OperandKind kind) {
    return std::ranges::all_of(factors, [&](const Factor& factor) {
      return operand_kind(x, factor.w, factor.role) == kind;
    });
  };
  const bool codes = all(OperandKind::kCodes), bf16 = !codes && all(OperandKind::kBf16);
  std::vector<at::Tensor> results;
  if (factors.size() < 2 || std::ssize(factors) > kMaxFactors || !(codes || bf16)) {
    for (const Factor& factor : factors) results.push_back(linear(x, factor.w, factor.role));
    return results;
  }
  std::vector<Sm90Product> products;
  for (const Factor& factor : factors) products.push_back({&factor.w.sm90(), factor.role});
  return linear_sm90(codes ? x.codes() : x.bf16_operand(), products);
}

}  // namespace hadal::ops
