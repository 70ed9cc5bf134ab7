#include "model/parameter.h"

#include <algorithm>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "ops/attention/heads.h"
#include "ops/attention/rope.h"
#include "ops/gemm/trained_product.h"
#include "ops/moe/permute.h"
#include "ops/sm90.h"
#include "ops/tape.h"

namespace hadal::model {

Storage Parameter::storage_in(ops::Numerics numerics) const {
  return numerics == ops::Numerics::kFp8 && storage == Storage::kFp4 ? Storage::kFp8 : storage;
}

ops::GemmRole Parameter::role_in(ops::Numerics numerics) const {
  const bool fp8 = numerics == ops::Numerics::kFp8 && role == ops::GemmRole::kFp4;
  return fp8 ? ops::GemmRole::kFp8 : role;
}

int64_t Parameter::local_units() const {
  if (shard.whole() || shard.axis != 0 || units == 1) return units;
  const int64_t rows = shape.at(0) / units;
  HADAL_CHECK(shard.offset % rows == 0 && shard.length % rows == 0, "parameter ", name,
              ": a shard of rows ", shard.offset, " to ", shard.offset + shard.length,
              " cuts through a unit of ", rows);
  return shard.length / rows;
}

int64_t Parameter::local_matrices() const {
  return kind == ParamKind::kExperts || kind == ParamKind::kGroups ? local_units() : 1;
}

void Parameter::hold(at::Tensor values) {
  const std::vector<int64_t> expected = local_shape();
  HADAL_CHECK(values.sizes() == at::IntArrayRef(expected), "parameter ", name, " is ",
              values.sizes(), ", expected ", at::IntArrayRef(expected));
  value = std::move(values);
  weight = {};
  kept_panels = std::make_shared<ops::PanelCache>();
}

void Parameter::hold(ops::Weight packed) {
  const std::vector<int64_t> expected = local_shape();
  const int64_t matrices = local_matrices();
  const int64_t rows = kind == ParamKind::kExperts ? expected.at(1) : expected.at(0) / matrices;
  HADAL_CHECK(
      packed.matrices() == matrices && packed.out() == rows && packed.in() == expected.back(),
      "parameter ", name, ": a weight of ", packed.matrices(), " x [", packed.out(), ", ",
      packed.in(), "], expected ", matrices, " x [", rows, ", ", expected.back(), "]");
  if (packed.form() == ops::WeightForm::kDense) return hold(packed.dense().reshape(expected));
  weight = std::move(packed);
  value = at::Tensor();
  kept_panels = std::make_shared<ops::PanelCache>();
}

void Parameter::hold_dense() {
  if (weight.defined()) hold(weight.values().reshape(local_shape()));
}

int64_t Parameter::num_bytes() const {
  return (value.defined() ? static_cast<int64_t>(value.nbytes()) : 0) + weight.num_bytes() +
         kept_panels->num_bytes();
}

at::Tensor Parameter::operand(ops::Numerics numerics) const {
  if (weight.defined()) return weight.values().reshape(local_shape());
  HADAL_CHECK(value.defined(), "parameter ", name, " has no value");
  if (numerics == ops::Numerics::kIdeal || storage == Storage::kF32 || as_stored) return value;
  if (value.scalar_type() == at::kBFloat16) return value;
  if (numerics == ops::Numerics::kBf16) return value.to(at::kBFloat16);
  return ops::straight_through(ops::official_rounding(value.detach(), storage_in(numerics)), value);
}

at::Tensor Parameter::values_in(ops::Numerics numerics) const {
  HADAL_CHECK(value.defined(), "parameter ", name, " has no value");
  const bool from_files = numerics == ops::Numerics::kReleased || numerics == ops::Numerics::kFp8;
  if (!from_files || storage != Storage::kBf16 || as_stored) return value;
  return ops::straight_through(value.detach().to(at::kBFloat16).to(value.scalar_type()), value);
}

ops::Weight Parameter::product_operand(ops::Numerics numerics) const {
  if (weight.defined()) {
    // The kernels that read these codes on a GPU round rows to E4M3, which `released` alone does.
    const bool rounds = weight.form() == ops::WeightForm::kSm90 && weight.sm90().rounds_rows();
    const bool kernels = !weight.device().is_cpu() || ops::as_hopper();
    return rounds && numerics != ops::Numerics::kReleased && kernels ? weight.to_dense() : weight;
  }
  const at::Tensor values = operand(numerics);
  // Masters under training change every step; what is rounded on the way is made anew.
  const bool constant = values.is_same(value) && !value.requires_grad() && value.is_cpu() &&
                        (value.scalar_type() == at::kBFloat16 || value.scalar_type() == at::kFloat);
  if (constant) return {values, local_matrices(), kept_panels};
  return ops::Weight(kind == ParamKind::kGroups
                         ? values.reshape({local_matrices(), -1, values.size(-1)})
                         : values);
}

namespace {

/// Whether the product is one of training on the CPU: then its gradient goes to the master in FP32,
/// past the operand's rounding.
bool trains(const Parameter& w, const at::Tensor& x) {
  const auto served = [](const at::Tensor& t) {
    return t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16;
  };
  return at::GradMode::is_enabled() && !w.weight.defined() && w.value.defined() &&
         (x.requires_grad() || w.value.requires_grad()) && ops::use_cpu_kernel(x) &&
         served(w.value) && w.value.is_contiguous();
}

/// The values that the product multiplies by, [matrices, out, in] of stacked ones.
at::Tensor constant_operand(const Parameter& w, ops::Numerics numerics) {
  const at::NoGradGuard no_grad;
  const at::Tensor values = w.operand(numerics);
  return w.kind == ParamKind::kGroups ? values.reshape({w.local_matrices(), -1, values.size(-1)})
                                      : values;
}

/// The same on the tape: the backward pass may round the master again.
at::Tensor trained_operand(const Parameter& w, ops::Numerics numerics) {
  const auto round = [&w, numerics](const at::Tensor&) { return constant_operand(w, numerics); };
  const at::Tensor values = ops::recorded("operand", round, w.value);
  return values.is_alias_of(w.value) ? values : ops::checkpointed(values);
}

}  // namespace

at::Tensor apply_linear(const Parameter& w, const at::Tensor& x, ops::Numerics numerics) {
  if (trains(w, x)) {
    const auto product = [role = w.role, numerics](const at::Tensor& rows, const at::Tensor& values,
                                                   const at::Tensor& master) {
      return ops::trained_linear(rows, values, master, role, numerics);
    };
    return ops::checkpointed(
        ops::recorded("product", product, x, trained_operand(w, numerics), w.value));
  }
  return ops::linear(x, w.product_operand(numerics), w.role);
}

at::Tensor apply_linear(const Parameter& w, const ops::ProductInput& x) {
  if (trains(w, x.x())) return apply_linear(w, x.rounded(w.role), x.numerics());
  return ops::linear(x, w.product_operand(x.numerics()), w.role);
}

std::vector<at::Tensor> apply_linears(const std::vector<const Parameter*>& weights,
                                      const ops::ProductInput& x) {
  std::vector<at::Tensor> results;
  const bool training =
      std::ranges::any_of(weights, [&](const Parameter* w) { return trains(*w, x.x()); });
  if (training) {
    for (const Parameter* w : weights) results.push_back(apply_linear(*w, x));
    return results;
  }
  std::vector<ops::Factor> factors;
  for (const Parameter* w : weights) factors.push_back({w->product_operand(x.numerics()), w->role});
  return ops::linear(x, factors);
}

void make_operands(const std::vector<const Parameter*>& weights, const ops::ProductInput& x) {
  for (const Parameter* w : weights) {
    if (trains(*w, x.x())) {
      x.rounded(w->role);
    } else {
      ops::make_operand(x, w->product_operand(x.numerics()), w->role);
    }
  }
}

at::Tensor apply_experts(const Parameter& w,
                         const at::Tensor& x,
                         const ops::Permutation& order,
                         ops::Numerics numerics) {
  if (trains(w, x)) {
    const auto product = [role = w.role_in(numerics), numerics](
                             const at::Tensor& rows, const at::Tensor& values,
                             const at::Tensor& master, const at::Tensor& offsets,
                             const at::Tensor& token) {
      return ops::trained_grouped_linear(rows, values, master, offsets, token, role, numerics);
    };
    return ops::checkpointed(ops::recorded("expert product", product, x,
                                           trained_operand(w, numerics), w.value, order.offsets,
                                           order.token));
  }
  return ops::grouped_linear(x, w.product_operand(numerics), order.offsets, w.role_in(numerics));
}

at::Tensor apply_groups(const Parameter& w,
                        const at::Tensor& x,
                        const at::Tensor& cos_sin,
                        ops::Numerics numerics) {
  if (trains(w, x)) {
    const auto rotate_back = [](const at::Tensor& heads, const at::Tensor& angles) {
      return ops::rope(heads, angles, /*inverse=*/true);
    };
    const at::Tensor rows =
        ops::checkpointed(ops::recorded("rotated back", rotate_back, x, cos_sin))
            .reshape({x.size(0), w.local_matrices(), w.shape.back()});
    const auto product = [](const at::Tensor& in, const at::Tensor& values,
                            const at::Tensor& master) {
      return ops::trained_group_linear(in, values, master);
    };
    return ops::checkpointed(
        ops::recorded("product", product, rows, trained_operand(w, numerics), w.value));
  }
  return ops::rotated_group_linear(x, cos_sin, w.product_operand(numerics));
}

}  // namespace hadal::model
