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

at::Tensor Optimizer::grad_norm() const {
  std::vector<at::Tensor> squares;
  for (const Slot& slot : slots_) {
    const at::Tensor& grad = slot.parameter->value.grad();
    if (grad.defined()) squares.push_back(grad.square().sum());
  }
  HADAL_CHECK(!squares.empty(), "optimizer: no parameter has a gradient");
  return at::stack(squares).sum().sqrt();
}

at::Tensor Optimizer::clip_gradients(double max_norm) {
  const at::NoGradGuard no_grad;
  const at::Tensor norm = grad_norm();
  const at::Tensor factor = (max_norm / (norm + 1e-12)).clamp_max(1.0);
  for (Slot& slot : slots_) {
    if (slot.parameter->value.grad().defined()) slot.parameter->value.mutable_grad().mul_(factor);
  }
  return norm;
}

void Optimizer::step(double lr) {
  const at::NoGradGuard no_grad;
  ++num_steps_;
  muon_step(lr);
  for (Slot& slot : slots_) {
    if (slot.rule != UpdateRule::kMuon && slot.parameter->value.grad().defined())
      adam_step(slot, lr);
  }
}

void Optimizer::muon_step(double lr) {
  // Matrices of one shape, whichever way round, are orthogonalised together; each gets the bits it
  // would get alone.
  std::map<std::pair<int64_t, int64_t>, std::vector<Slot*>> by_shape;
  for (Slot& slot : slots_) {
    if (slot.rule != UpdateRule::kMuon || !slot.parameter->value.grad().defined()) continue;
    const at::Tensor view = logical_view(slot.momentum, *slot.parameter);
    by_shape[{view.size(1), view.size(2)}].push_back(&slot);
  }
  for (auto& [shape, slots] : by_shape) {
    const auto [rows, cols] = shape;
    std::vector<at::Tensor> updates;
    std::vector<int64_t> counts;
    for (Slot* slot : slots) {
      const at::Tensor& grad = slot->parameter->value.grad();
      slot->momentum.mul_(params_.muon_momentum).add_(grad);
      updates.push_back(
          logical_view(slot->momentum * params_.muon_momentum + grad, *slot->parameter));
      counts.push_back(updates.back().size(0));
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
    int64_t first = 0;
    for (size_t i = 0; i < slots.size(); ++i) {
      at::Tensor w = logical_view(slots[i]->parameter->value, *slots[i]->parameter);
      const at::Tensor step = direction.narrow(0, first, counts[i]) + w * params_.weight_decay;
      w.sub_(step * moves.narrow(0, first, counts[i]) * lr);
      first += counts[i];
    }
  }
}

void Optimizer::adam_step(Slot& slot, double lr) {
  const at::Tensor grad = slot.parameter->value.grad();
  slot.momentum.mul_(params_.adam_beta1).add_(grad, 1.0 - params_.adam_beta1);
  slot.variance.mul_(params_.adam_beta2).addcmul_(grad, grad, 1.0 - params_.adam_beta2);
  const double steps = static_cast<double>(num_steps_);
  const double correction1 = 1.0 - std::pow(params_.adam_beta1, steps);
  const double correction2 = 1.0 - std::pow(params_.adam_beta2, steps);
  // eps is negligible next to any gradient; an entry that never had one would be 0 / 0 in FP32, so
  // it stays put.
  const at::Tensor denominator = (slot.variance / correction2).sqrt().add_(params_.adam_eps);
  at::Tensor update = (slot.momentum / correction1) / denominator;
  update = at::where(slot.variance == 0, at::zeros_like(update), update);
  if (slot.rule == UpdateRule::kAdamDecay) {
    slot.parameter->value.mul_(1.0 - lr * params_.weight_decay);
  }
  slot.parameter->value.sub_(update * lr);
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
