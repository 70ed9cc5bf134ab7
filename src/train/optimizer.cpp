#include "train/optimizer.h"

#include <cmath>
#include <map>
#include <tuple>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/optim/newton_schulz.h"

namespace hadal::train {
namespace {

using model::Parameter;
using model::ParamKind;

/// The parameter or its gradient as [units, rows, cols] of independent matrices.
at::Tensor logical_view(const at::Tensor& tensor, const Parameter& parameter) {
  return tensor.reshape({parameter.units, -1, tensor.size(-1)});
}

}  // namespace

UpdateRule update_rule(const Parameter& parameter) {
  switch (parameter.kind) {
    case ParamKind::kMatrix:
    case ParamKind::kGroups:
    case ParamKind::kExperts:
    case ParamKind::kHcFn:
      return UpdateRule::kMuon;
    case ParamKind::kEmbedding:
    case ParamKind::kHead:
      return UpdateRule::kAdamDecay;
    case ParamKind::kNorm:
    case ParamKind::kHcBase:
    case ParamKind::kHcScale:
    case ParamKind::kSink:
    case ParamKind::kApe:
      return UpdateRule::kAdam;
    case ParamKind::kGateBias:
    case ParamKind::kHashTable:
      return UpdateRule::kNone;
  }
  return UpdateRule::kNone;
}

Optimizer::Optimizer(model::Transformer& model, OptimizerParams params) : params_(params) {
  model.visit([&](Parameter& parameter) {
    const UpdateRule rule = update_rule(parameter);
    if (rule == UpdateRule::kNone) return;
    HADAL_CHECK(parameter.value.requires_grad() && parameter.value.is_leaf(),
                "optimizer: ", parameter.name, " is no leaf that requires a gradient");
    Slot slot{&parameter, rule, at::zeros_like(parameter.value.detach()), {}};
    if (rule != UpdateRule::kMuon) slot.variance = at::zeros_like(parameter.value.detach());
    slots_.push_back(std::move(slot));
  });
}

void Optimizer::zero_grad() {
  for (Slot& slot : slots_) slot.parameter->value.mutable_grad().reset();
}

std::vector<at::Tensor> Optimizer::gradients() const {
  std::vector<at::Tensor> grads;
  for (const Slot& slot : slots_) {
    const at::Tensor& grad = slot.parameter->value.grad();
    if (grad.defined()) grads.push_back(grad);
  }
  HADAL_CHECK(!grads.empty(), "optimizer: no parameter has a gradient");
  return grads;
}

at::Tensor Optimizer::grad_norm() const {
  const at::NoGradGuard no_grad;
  return at::stack(at::_foreach_norm(gradients())).square().sum().sqrt();
}

at::Tensor Optimizer::clip_gradients(double max_norm) {
  const at::NoGradGuard no_grad;
  const at::Tensor norm = grad_norm();
  const at::Tensor factor = (max_norm / (norm + 1e-12)).clamp_max(1.0);
  at::_foreach_mul_(gradients(), factor);
  return norm;
}

void Optimizer::step(double lr) {
  const at::NoGradGuard no_grad;
  ++num_steps_;
  muon_step(lr);
  adam_step(lr);
}

void Optimizer::muon_step(double lr) {
  std::vector<Slot*> moved;
  std::vector<at::Tensor> momenta, grads;
  for (Slot& slot : slots_) {
    if (slot.rule != UpdateRule::kMuon || !slot.parameter->value.grad().defined()) continue;
    moved.push_back(&slot);
    momenta.push_back(slot.momentum);
    grads.push_back(slot.parameter->value.grad());
  }
  if (moved.empty()) return;
  at::_foreach_mul_(momenta, params_.muon_momentum);
  at::_foreach_add_(momenta, grads);
  std::vector<at::Tensor> ahead = at::_foreach_mul(momenta, params_.muon_momentum);
  at::_foreach_add_(ahead, grads);

  // Matrices of one shape, whichever way round, are orthogonalised together; each gets the bits it
  // would get alone.
  std::map<std::pair<int64_t, int64_t>, std::vector<size_t>> by_shape;
  for (size_t i = 0; i < moved.size(); ++i) {
    const at::Tensor view = logical_view(ahead[i], *moved[i]->parameter);
    by_shape[{view.size(1), view.size(2)}].push_back(i);
  }
  std::vector<at::Tensor> weights, steps;
  for (const auto& [shape, members] : by_shape) {
    const auto [rows, cols] = shape;
    std::vector<at::Tensor> updates, values;
    for (const size_t i : members) {
      updates.push_back(logical_view(ahead[i], *moved[i]->parameter));
      values.push_back(logical_view(moved[i]->parameter->value, *moved[i]->parameter));
    }
    const at::Tensor u = at::cat(updates);
    const double size = static_cast<double>(rows * cols);
    // Layer 0's mixing matrices have true gradients of 0; noise must not become a full-size update.
    const at::Tensor moves =
        (u.square().sum({1, 2}, /*keepdim=*/true).sqrt() >= 1e-12 * std::sqrt(size))
            .to(u.scalar_type());
    const double factor =
        std::sqrt(static_cast<double>(std::max(rows, cols))) * params_.muon_update_rms;
    const at::Tensor direction = ops::newton_schulz(u, params_.low_precision_muon) * factor;
    const at::Tensor step = (direction + at::cat(values) * params_.weight_decay) * moves * lr;
    int64_t first = 0;
    for (const at::Tensor& value : values) {
      weights.push_back(value);
      steps.push_back(step.narrow(0, first, value.size(0)));
      first += value.size(0);
    }
  }
  at::_foreach_sub_(weights, steps);
}

void Optimizer::adam_step(double lr) {
  std::vector<at::Tensor> values, decayed, grads, means, variances;
  for (Slot& slot : slots_) {
    if (slot.rule == UpdateRule::kMuon || !slot.parameter->value.grad().defined()) continue;
    values.push_back(slot.parameter->value);
    if (slot.rule == UpdateRule::kAdamDecay) decayed.push_back(slot.parameter->value);
    grads.push_back(slot.parameter->value.grad());
    means.push_back(slot.momentum);
    variances.push_back(slot.variance);
  }
  if (values.empty()) return;
  at::_foreach_mul_(means, params_.adam_beta1);
  at::_foreach_add_(means, grads, 1.0 - params_.adam_beta1);
  at::_foreach_mul_(variances, params_.adam_beta2);
  at::_foreach_addcmul_(variances, grads, grads, 1.0 - params_.adam_beta2);
  const double steps = static_cast<double>(num_steps_);
  const double correction1 = 1.0 - std::pow(params_.adam_beta1, steps);
  const double correction2 = 1.0 - std::pow(params_.adam_beta2, steps);
  std::vector<at::Tensor> denominators = at::_foreach_div(variances, correction2);
  at::_foreach_sqrt_(denominators);
  at::_foreach_add_(denominators, params_.adam_eps);
  std::vector<at::Tensor> updates = at::_foreach_div(means, correction1);
  at::_foreach_div_(updates, denominators);
  // An entry whose squares vanish in FP32 stays put: eps is negligible next to any gradient, so its
  // quotient would mean nothing.
  at::_foreach_mul_(updates, at::_foreach_sign(variances));
  if (!decayed.empty()) at::_foreach_mul_(decayed, 1.0 - lr * params_.weight_decay);
  at::_foreach_mul_(updates, lr);
  at::_foreach_sub_(values, updates);
}

std::vector<std::pair<std::string, at::Tensor>> Optimizer::state() {
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (Slot& slot : slots_) {
    result.emplace_back(slot.parameter->name + "/momentum", slot.momentum);
    if (slot.variance.defined())
      result.emplace_back(slot.parameter->name + "/variance", slot.variance);
  }
  return result;
}

}  // namespace hadal::train
