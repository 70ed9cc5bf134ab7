// Gradients of rows whose places several ranks share (docs/decisions/0030-parts-of-rows.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "dist/group.h"
#include "train/objective.h"
#include "train/step_sums.h"

namespace hadal::train {

/// Elements [begin, end) of a parameter's gradient, and the member of the group that gets their
/// sum.
struct CollectedPiece {
  size_t parameter = 0;  ///< in StepSums::parameters()
  int64_t begin = 0, end = 0;
  int64_t member = 0;
};

/// A gradient of which every member holds the node of its places.
struct PartNode {
  size_t parameter = 0;
  at::Tensor gradient;  ///< contiguous FP32; undefined: none, on all members
};

/// Of every piece that is this member's, the sum of all members' nodes by the row's tree, in the
/// node's memory. What it holds of other pieces is left over, for nobody to read. All members call
/// it with the same pieces and the same nodes defined; else Error naming a parameter's number.
void collect_whole(dist::Group& group,
                   std::span<const CollectedPiece> pieces,
                   std::vector<PartNode>& nodes);

/// accumulate() of rows of which this rank computes one part each (model/row_part.h): leaves in
/// `sums`, row after row, the bits of the whole row's gradients in the pieces that are this
/// member's, and the whole row's measures on every member. All members have the same rows in the
/// same order. `pieces` cover every parameter that takes a gradient. On the CPU, FP32 or BF16.
void accumulate_parts(const model::Transformer& model,
                      const MicroBatch& micro,
                      dist::Group& group,
                      const StepCounts& counts,
                      const ObjectiveParams& params,
                      std::span<const CollectedPiece> pieces,
                      StepSums& sums);

}  // namespace hadal::train
