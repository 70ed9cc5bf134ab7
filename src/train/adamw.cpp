#include "train/adamw.h"

#include <cmath>
#include <vector>

#include <ATen/ATen.h>

#include "train/slots.h"

namespace hadal::train {

void adamw_step(std::span<OptimizerSlot> slots,
                const OptimizerParams& params,
                int64_t num_steps,
                double lr) {
  std::vector<OptimizerSlot*> moved;
  for (OptimizerSlot& slot : slots) {
    if (slot.rule != UpdateRule::kMuon && slot.parameter->value.grad().defined())
      moved.push_back(&slot);
  }
  if (moved.empty()) return;
  const double steps = static_cast<double>(num_steps);
  const double correction1 = 1.0 - std::pow(params.adam_beta1, steps);
  const double correction2 = 1.0 - std::pow(params.adam_beta2, steps);
  for_each_slot(moved.size(), moved[0]->momentum.is_cpu(), [&](size_t i) {
    const OptimizerSlot& slot = *moved[i];
    const at::Tensor& value = slot.parameter->value;
    const at::Tensor& grad = value.grad();
    slot.momentum.mul_(params.adam_beta1).add_(grad, 1.0 - params.adam_beta1);
    slot.variance.mul_(params.adam_beta2).addcmul_(grad, grad, 1.0 - params.adam_beta2);
    const at::Tensor denominator = slot.variance.div(correction2).sqrt_().add_(params.adam_eps);
    at::Tensor update = slot.momentum.div(correction1).div_(denominator);
    // An entry whose squares vanish in FP32 stays put: eps is negligible next to any gradient, so
    // its quotient would mean nothing.
    update.mul_(at::sign(slot.variance));
    if (slot.rule == UpdateRule::kAdamDecay) value.mul_(1.0 - lr * params.weight_decay);
    value.sub_(update.mul_(lr));
  });
}

}  // namespace hadal::train
