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

/// Elements of a piece as [units, rows, cols] of independent matrices.
at::Tensor logical_view(const at::Tensor& flat, const model::Parameter& parameter) {
  const std::vector<int64_t> shape = parameter.local_shape();
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
  return flat.view({-1, rows / parameter.local_units(), shape.back()});
}

/// [units, 1, 1]: 1 where a matrix of u moves. Layer 0's mixing matrices have true gradients of 0;
/// noise must not become a full-size update.
at::Tensor moving(const at::Tensor& u, bool on_cpu) {
  const double least = 1e-12 * std::sqrt(static_cast<double>(u.size(1) * u.size(2)));
  if (!on_cpu)
    return (u.square().sum({1, 2}, /*keepdim=*/true).sqrt() >= least).to(u.scalar_type());
  const at::Tensor norms = at::empty({u.size(0), 1, 1}, u.options());
  for_each_slot(static_cast<size_t>(u.size(0)), true, [&](size_t i) {
    const auto unit = static_cast<int64_t>(i);
    norms[unit].fill_(u[unit].square().sum().sqrt());
  });
  return (norms >= least).to(u.scalar_type());
}

}  // namespace

void muon_step(std::span<const MovedPiece> pieces, const OptimizerParams& params, double lr) {
  std::vector<const MovedPiece*> moved;
  for (const MovedPiece& piece : pieces)
    if (piece.rule == UpdateRule::kMuon) moved.push_back(&piece);
  if (moved.empty()) return;
  const bool on_cpu = moved[0]->momentum.is_cpu();
  std::vector<at::Tensor> ahead(moved.size());
  for_each_slot(moved.size(), on_cpu, [&](size_t i) {
    const MovedPiece& piece = *moved[i];
    piece.momentum.mul_(params.muon_momentum).add_(piece.gradient);
    ahead[i] = piece.momentum.mul(params.muon_momentum).add_(piece.gradient);
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
    const at::Tensor moves = moving(u, on_cpu);
    const double factor =
        std::sqrt(static_cast<double>(std::max(rows, cols))) * params.muon_update_rms;
    const at::Tensor direction = ops::newton_schulz(u, params.low_precision_muon);
    for_each_slot(members.size(), on_cpu, [&](size_t m) {
      const auto own = [&](const at::Tensor& x) {
        return x.narrow(0, first[m], first[m + 1] - first[m]);
      };
      const MovedPiece& piece = *moved[members[m]];
      const at::Tensor value = logical_view(piece.values, *piece.parameter);
      const at::Tensor step =
          own(direction).mul(factor).add_(value.mul(params.weight_decay)).mul_(own(moves)).mul_(lr);
      value.sub_(step);
    });
  }
}

}  // namespace hadal::train
