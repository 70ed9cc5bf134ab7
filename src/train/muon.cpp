#include "train/muon.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include "ops/optim/newton_schulz.h"
#include "train/slots.h"

namespace hadal::train {
namespace {

/// The parameter or its gradient as [units, rows, cols] of independent matrices.
at::Tensor logical_view(const at::Tensor& tensor, const model::Parameter& parameter) {
  return tensor.reshape({parameter.local_units(), -1, tensor.size(-1)});
}

}  // namespace

void muon_step(std::span<OptimizerSlot> slots, const OptimizerParams& params, double lr) {
  std::vector<OptimizerSlot*> moved;
  for (OptimizerSlot& slot : slots) {
    if (slot.rule == UpdateRule::kMuon && slot.parameter->value.grad().defined())
      moved.push_back(&slot);
  }
  if (moved.empty()) return;
  const bool on_cpu = moved[0]->momentum.is_cpu();
  std::vector<at::Tensor> ahead(moved.size());
  for_each_slot(moved.size(), on_cpu, [&](size_t i) {
    const at::Tensor& grad = moved[i]->parameter->value.grad();
    moved[i]->momentum.mul_(params.muon_momentum).add_(grad);
    ahead[i] = moved[i]->momentum.mul(params.muon_momentum).add_(grad);
  });

  // Matrices of one shape, whichever way round, are orthogonalised together; each gets the bits it
  // would get alone.
  std::map<std::pair<int64_t, int64_t>, std::vector<size_t>> by_shape;
  for (size_t i = 0; i < moved.size(); ++i) {
    const at::Tensor view = logical_view(ahead[i], *moved[i]->parameter);
    by_shape[{view.size(1), view.size(2)}].push_back(i);
  }
  for (const auto& [shape, members] : by_shape) {
    const auto [rows, cols] = shape;
    std::vector<at::Tensor> updates;
    std::vector<int64_t> first{0};  // unit of each member
    for (const size_t i : members) {
      updates.push_back(logical_view(ahead[i], *moved[i]->parameter));
      first.push_back(first.back() + updates.back().size(0));
    }
    const at::Tensor u = at::cat(updates);
    const double size = static_cast<double>(rows * cols);
    // Layer 0's mixing matrices have true gradients of 0; noise must not become a full-size update.
    const at::Tensor moves =
        (u.square().sum({1, 2}, /*keepdim=*/true).sqrt() >= 1e-12 * std::sqrt(size))
            .to(u.scalar_type());
    const double factor =
        std::sqrt(static_cast<double>(std::max(rows, cols))) * params.muon_update_rms;
    const at::Tensor direction = ops::newton_schulz(u, params.low_precision_muon);
    for_each_slot(members.size(), on_cpu, [&](size_t m) {
      const auto own = [&](const at::Tensor& x) {
        return x.narrow(0, first[m], first[m + 1] - first[m]);
      };
      model::Parameter& parameter = *moved[members[m]]->parameter;
      const at::Tensor value = logical_view(parameter.value, parameter);
      const at::Tensor step =
          own(direction).mul(factor).add_(value.mul(params.weight_decay)).mul_(own(moves)).mul_(lr);
      value.sub_(step);
    });
  }
}

}  // namespace hadal::train
