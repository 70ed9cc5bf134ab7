#include "train/optimizer.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "train/adamw.h"
#include "train/muon.h"

namespace hadal::train {
namespace {

using model::Parameter;
using model::ParamKind;

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
    OptimizerSlot slot{&parameter, rule, at::zeros_like(parameter.value.detach()), {}};
    if (rule != UpdateRule::kMuon) slot.variance = at::zeros_like(parameter.value.detach());
    slots_.push_back(std::move(slot));
  });
}

void Optimizer::zero_grad() {
  for (OptimizerSlot& slot : slots_) slot.parameter->value.mutable_grad().reset();
}

std::vector<at::Tensor> Optimizer::gradients() const {
  std::vector<at::Tensor> grads;
  for (const OptimizerSlot& slot : slots_) {
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
  muon_step(slots_, params_, lr);
  adamw_step(slots_, params_, num_steps_, lr);
}

std::vector<std::pair<std::string, at::Tensor>> Optimizer::state() {
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (OptimizerSlot& slot : slots_) {
    result.emplace_back(slot.parameter->name + "/momentum", slot.momentum);
    if (slot.variance.defined())
      result.emplace_back(slot.parameter->name + "/variance", slot.variance);
  }
  return result;
}

}  // namespace hadal::train
