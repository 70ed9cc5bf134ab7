// A step's sums over all ranks: the same bits on any number of them
// (docs/decisions/0023-ranks.md).
#pragma once

#include <cstdint>
#include <vector>

#include "dist/ranks.h"
#include "model/transformer.h"
#include "train/objective.h"
#include "train/optimizer.h"
#include "train/step_sums.h"

namespace hadal::train {

/// A gradient that is not finite, where it arose.
struct NotFinite {
  int64_t rank = 0;
  size_t parameter = 0;  ///< among those that take a gradient, in the model's order
};

/// What a rank knows of a step.
struct StepShare {
  Span rows;      ///< this rank's
  int64_t total;  ///< rows of the step
};

/// Counts over all ranks.
void sum_counts(StepCounts& counts, const model::ModelConfig& config, dist::Ranks& ranks);

/// What `sums` took of this rank's rows, and what the other ranks took of theirs, joined by the
/// step's tree. Each piece's gradient is in the optimizer of its owner, parameters have none; the
/// measures are on every rank. `not_finite`: per rank the first gradient that is not, on every rank
/// the same. In place of StepSums::finish where there are several ranks.
StepMeasures sum_over_ranks(StepSums& sums,
                            const StepShare& share,
                            const model::ModelConfig& config,
                            Optimizer& optimizer,
                            dist::Ranks& ranks,
                            std::vector<NotFinite>& not_finite);

/// The first of the parameters whose gradient is not finite; parameters.size(): none.
size_t first_not_finite(const std::vector<at::Tensor>& gradients);

}  // namespace hadal::train
