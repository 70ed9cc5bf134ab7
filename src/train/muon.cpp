#include "train/muon.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "ops/optim/newton_schulz.h"

namespace hadal::train {
namespace {

/// The parameter or its gradient as [units, rows, cols] of independent matrices.
at::Tensor logical_view(const at::Tensor& tensor, const model::Parameter& parameter) {
  return tensor.reshape({parameter.local_units(), -1, tensor.size(-1)});
}

}  // namespace

void muon_step(std::span<OptimizerSlot> slots, const OptimizerParams& params, double lr) {
  std::vector<OptimizerSlot*> moved;
  std::vector<at::Tensor> momenta, grads;
  for (OptimizerSlot& slot : slots) {
    if (slot.rule != UpdateRule::kMuon || !slot.parameter->value.grad().defined()) continue;
    moved.push_back(&slot);
    momenta.push_back(slot.momentum);
    grads.push_back(slot.parameter->value.grad());
  }
  if (moved.empty()) return;
  at::_foreach_mul_(momenta, params.muon_momentum);
  at::_foreach_add_(momenta, grads);
  std::vector<at::Tensor> ahead = at::_foreach_mul(momenta, params.muon_momentum);
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
        std::sqrt(static_cast<double>(std::max(rows, cols))) * params.muon_update_rms;
    const at::Tensor direction = ops::newton_schulz(u, params.low_precision_muon) * factor;
    const at::Tensor step = (direction + at::cat(values) * params.weight_decay) * moves * lr;
    int64_t first = 0;
    for (const at::Tensor& value : values) {
      weights.push_back(value);
      steps.push_back(step.narrow(0, first, value.size(0)));
      first += value.size(0);
    }
  }
  at::_foreach_sub_(weights, steps);
}

}  // namespace hadal::train
