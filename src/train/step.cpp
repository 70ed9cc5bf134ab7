#include "train/step.h"

#include <cmath>

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::train {
namespace {

/// "rank 2: layers.0.attn.wq_a.weight"; without the rank where there is only one.
std::vector<std::string> names_of(const std::vector<NotFinite>& found,
                                  const Optimizer& optimizer,
                                  const dist::Ranks& ranks) {
  std::vector<std::string> names;
  for (const NotFinite& each : found) {
    const std::string rank = ranks.size() > 1 ? concat("rank ", each.rank, ": ") : "";
    names.push_back(rank + optimizer.slots()[each.parameter].parameter->name);
  }
  return names;
}

std::vector<NotFinite> not_finite_here(const StepSums& sums) {
  std::vector<at::Tensor> gradients;
  for (const at::Tensor& parameter : sums.parameters()) gradients.push_back(parameter.grad());
  const size_t first = first_not_finite(gradients);
  if (first == gradients.size()) return {};
  return {{.rank = 0, .parameter = first}};
}

}  // namespace

double StepOutcome::loss() const { return measures.main_loss.item<double>(); }

StepOutcome training_step(model::Transformer& model,
                          Optimizer& optimizer,
                          std::span<const MicroBatch> batches,
                          const StepRules& rules) {
  int64_t rows = 0;
  for (const MicroBatch& batch : batches) rows += batch.rows;
  dist::Ranks one;
  return training_step(model, optimizer, batches, rules, {.rows = {0, rows}, .total = rows}, one);
}

StepOutcome training_step(model::Transformer& model,
                          Optimizer& optimizer,
                          std::span<const MicroBatch> batches,
                          const StepRules& rules,
                          const StepShare& share,
                          dist::Ranks& ranks,
                          Pipeline* pipeline,
                          SharedRows* shared) {
  StepCounts counts;
  // Every stage has the rows, and every member that shares them; the first one counts them.
  const bool counts_rows = (pipeline == nullptr || pipeline->layers().first) &&
                           (shared == nullptr || shared->group.index() == 0);
  if (counts_rows)
    for (const MicroBatch& batch : batches) counts.add(batch, model.config());
  sum_counts(counts, model.config(), ranks);
  HADAL_CHECK(counts.rows == share.total, "step: the ranks have ", counts.rows, " rows of ",
              share.total);
  StepSums sums(model, share.rows.begin);
  if (pipeline != nullptr) {
    pipeline->accumulate(model, passes_of(batches), counts, rules.objective, sums, shared);
  } else if (shared != nullptr) {
    for (const MicroBatch& batch : batches)
      accumulate_parts(model, batch, *shared, counts, rules.objective, sums);
  } else {
    for (const MicroBatch& batch : batches) accumulate(model, batch, counts, rules.objective, sums);
  }

  StepOutcome outcome;
  std::vector<NotFinite> not_finite;
  outcome.measures =
      ranks.size() == 1 ? sums.finish()
                        : sum_over_ranks(sums, share, model.config(), optimizer, ranks, not_finite);
  optimizer.fill_gradients(
      [&](const model::Parameter& parameter) { return is_trained(parameter, rules.objective); });
  outcome.norm = (rules.clip_norm > 0.0 ? optimizer.clip_gradients(rules.clip_norm, ranks)
                                        : optimizer.grad_norm(ranks))
                     .item<double>();
  outcome.moved = std::isfinite(outcome.norm);
  if (!outcome.moved) {
    if (ranks.size() == 1) not_finite = not_finite_here(sums);
    outcome.not_finite = names_of(not_finite, optimizer, ranks);
    return outcome;
  }
  if (rules.learning_rate > 0.0) {
    optimizer.step(rules.learning_rate);
    optimizer.spread(ranks);
  }
  if (rules.objective.mode != model::AttentionMode::kIndexerWarmup)
    update_router_bias(model, outcome.measures, rules.router_bias_speed);
  return outcome;
}

}  // namespace hadal::train
