#include "train/adamw.h"

#include <cmath>
#include <vector>

#include <ATen/ATen.h>

namespace hadal::train {

void adamw_step(std::span<OptimizerSlot> slots,
                const OptimizerParams& params,
                int64_t num_steps,
                double lr) {
  std::vector<at::Tensor> values, decayed, grads, means, variances;
  for (OptimizerSlot& slot : slots) {
    if (slot.rule == UpdateRule::kMuon || !slot.parameter->value.grad().defined()) continue;
    values.push_back(slot.parameter->value);
    if (slot.rule == UpdateRule::kAdamDecay) decayed.push_back(slot.parameter->value);
    grads.push_back(slot.parameter->value.grad());
    means.push_back(slot.momentum);
    variances.push_back(slot.variance);
  }
  if (values.empty()) return;
  at::_foreach_mul_(means, params.adam_beta1);
  at::_foreach_add_(means, grads, 1.0 - params.adam_beta1);
  at::_foreach_mul_(variances, params.adam_beta2);
  at::_foreach_addcmul_(variances, grads, grads, 1.0 - params.adam_beta2);
  const double steps = static_cast<double>(num_steps);
  const double correction1 = 1.0 - std::pow(params.adam_beta1, steps);
  const double correction2 = 1.0 - std::pow(params.adam_beta2, steps);
  std::vector<at::Tensor> denominators = at::_foreach_div(variances, correction2);
  at::_foreach_sqrt_(denominators);
  at::_foreach_add_(denominators, params.adam_eps);
  std::vector<at::Tensor> updates = at::_foreach_div(means, correction1);
  at::_foreach_div_(updates, denominators);
  // An entry whose squares vanish in FP32 stays put: eps is negligible next to any gradient, so its
  // quotient would mean nothing.
  at::_foreach_mul_(updates, at::_foreach_sign(variances));
  if (!decayed.empty()) at::_foreach_mul_(decayed, 1.0 - lr * params.weight_decay);
  at::_foreach_mul_(updates, lr);
  at::_foreach_sub_(values, updates);
}

}  // namespace hadal::train
