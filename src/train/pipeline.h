// A stage of a pipeline at work: passes over a step's rows, forward and backward, with the streams
// and their gradients as what the stages hand to each other (docs/decisions/0031-pipeline.md).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "dist/group.h"
#include "model/stage_split.h"
#include "train/objective.h"
#include "train/part_sums.h"

namespace hadal::train {

class Pipeline {
 public:
  /// `group`: the ranks of one pipeline, as many as the split has stages, in their order.
  Pipeline(dist::Group group, model::StageSplit split);

  int64_t stages() const { return group_.size(); }
  int64_t stage() const { return group_.index(); }
  const model::StageSplit& split() const { return split_; }
  const model::LayerRun& layers() const { return layers_; }

  /// Forward and backward passes of this stage over rows, each a MicroBatch that is one pass, in
  /// the order of the schedule: a row's gradients and measures are the next leaf of `sums`, in the
  /// order of the rows. All stages pass the same rows, counts and params; values of other stages'
  /// parameters may be undefined. Gradients and losses have the bits of one process with the whole
  /// model. Losses are in the measures of the last stage, loads of experts in those of their
  /// block's. Errors: RankLost.
  ///   shared  where ranks of one stage share the places of every row: all of them call it with
  ///           the same rows; null: whole rows
  void accumulate(const model::Transformer& model,
                  const std::vector<const MicroBatch*>& rows,
                  const StepCounts& counts,
                  const ObjectiveParams& params,
                  StepSums& sums,
                  SharedRows* shared = nullptr);

  /// Each row's evaluation on the last stage, nothing elsewhere.
  std::vector<Evaluation> evaluate(const model::Transformer& model,
                                   const std::vector<const MicroBatch*>& rows,
                                   model::AttentionMode mode,
                                   ops::Numerics numerics);

 private:
  dist::Group group_;
  model::StageSplit split_;
  model::LayerRun layers_;
};

/// The passes of these micro-batches: on the CPU each of their rows.
std::vector<const MicroBatch*> passes_of(std::span<const MicroBatch> batches);

}  // namespace hadal::train
