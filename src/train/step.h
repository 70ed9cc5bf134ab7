// One update of a model: gradients of some micro-batches, clipping, the optimizer, the router
// biases.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "dist/ranks.h"
#include "train/objective.h"
#include "train/optimizer.h"
#include "train/part_sums.h"
#include "train/pipeline.h"
#include "train/rank_sums.h"

namespace hadal::train {

struct StepRules {
  ObjectiveParams objective;
  double learning_rate = 0.0;  ///< 0: gradients and measures, no update of the parameters
  double clip_norm = 0.0;      ///< of all gradients together; 0: none
  double router_bias_speed = 0.0;
};

struct StepOutcome {
  StepMeasures measures;
  double norm = 0.0;  ///< of the gradients, before clipping
  bool moved = true;  ///< false: the norm is not finite, nothing was updated
  /// Then: on which ranks, and the first parameter there ("rank 2: layers.0.attn.wq_a.weight").
  std::vector<std::string> not_finite;
  double loss() const;
};

/// Adds up the gradients of the micro-batches and moves the model by them.
StepOutcome training_step(model::Transformer& model,
                          Optimizer& optimizer,
                          std::span<const MicroBatch> batches,
                          const StepRules& rules);
/// The same of a step whose rows are on several ranks: `batches` hold those of share.rows. All
/// ranks move their models alike, by the bits that one rank with all rows would give.
///   pipeline  where this rank has the layers of one stage; null: all layers
///   shared    where it has a part of every row; null: whole rows
StepOutcome training_step(model::Transformer& model,
                          Optimizer& optimizer,
                          std::span<const MicroBatch> batches,
                          const StepRules& rules,
                          const StepShare& share,
                          dist::Ranks& ranks,
                          Pipeline* pipeline = nullptr,
                          SharedRows* shared = nullptr);

}  // namespace hadal::train
