#include "train/adamw.h"

#include <cmath>
#include <vector>

#include <ATen/ATen.h>

#include "train/slots.h"

namespace hadal::train {

void adamw_step(std::span<const MovedPiece> pieces,
                const OptimizerParams& params,
                int64_t num_steps,
                double lr) {
  std::vector<const MovedPiece*> moved;
  for (const MovedPiece& piece : pieces)
    if (piece.rule != UpdateRule::kMuon) moved.push_back(&piece);
  if (moved.empty()) return;
  const double steps = static_cast<double>(num_steps);
  const double correction1 = 1.0 - std::pow(params.adam_beta1, steps);
  const double correction2 = 1.0 - std::pow(params.adam_beta2, steps);
  for_each_slot(moved.size(), moved[0]->momentum.is_cpu(), [&](size_t i) {
    const MovedPiece& piece = *moved[i];
    const at::Tensor &value = piece.values, &grad = piece.gradient;
    piece.momentum.mul_(params.adam_beta1).add_(grad, 1.0 - params.adam_beta1);
    piece.variance.mul_(params.adam_beta2).addcmul_(grad, grad, 1.0 - params.adam_beta2);
    const at::Tensor denominator = piece.variance.div(correction2).sqrt_().add_(params.adam_eps);
    at::Tensor update = piece.momentum.div(correction1).div_(denominator);
    // An entry whose squares vanish in FP32 stays put: eps is negligible next to any gradient, so
    // its quotient would mean nothing.
    update.mul_(at::sign(piece.variance));
    if (piece.rule == UpdateRule::kAdamDecay) value.mul_(1.0 - lr * params.weight_decay);
    value.sub_(update.mul_(lr));
  });
}

}  // namespace hadal::train
