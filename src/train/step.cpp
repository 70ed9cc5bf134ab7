#include "train/step.h"

#include <cmath>

#include <ATen/ATen.h>

namespace hadal::train {

double StepOutcome::loss() const { return measures.main_loss.item<double>(); }

StepOutcome training_step(model::Transformer& model,
                          Optimizer& optimizer,
                          std::span<const MicroBatch> batches,
                          const StepRules& rules) {
  StepCounts counts;
  for (const MicroBatch& batch : batches) counts.add(batch, model.config());
  StepSums sums(model);
  for (const MicroBatch& batch : batches) accumulate(model, batch, counts, rules.objective, sums);
  StepOutcome outcome{.measures = sums.finish()};
  outcome.norm =
      (rules.clip_norm > 0.0 ? optimizer.clip_gradients(rules.clip_norm) : optimizer.grad_norm())
          .item<double>();
  outcome.moved = std::isfinite(outcome.norm);
  if (!outcome.moved) return outcome;
  if (rules.learning_rate > 0.0) optimizer.step(rules.learning_rate);
  if (rules.objective.mode != model::AttentionMode::kIndexerWarmup)
    update_router_bias(model, outcome.measures, rules.router_bias_speed);
  return outcome;
}

}  // namespace hadal::train
