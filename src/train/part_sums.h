// Gradients of rows whose places several ranks share (docs/decisions/0030-parts-of-rows.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "dist/group.h"
#include "train/objective.h"
#include "train/ownership.h"
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
/// it with the same pieces, by parameter, and the same nodes defined; else Error naming a
/// parameter's number.
void collect_whole(dist::Group& group,
                   std::span<const CollectedPiece> pieces,
                   std::vector<PartNode>& nodes);

/// A group whose members share the places of every row, and who of them gets what of the gradients.
struct SharedRows {
  dist::Group group;
  std::vector<CollectedPiece> pieces;  ///< cover every parameter that takes a gradient
};
/// The pieces of the owners, each at the member that stands in its group where the owner stands in
/// his (Ownership::holder).
std::vector<CollectedPiece> collected_pieces(const Ownership& ownership);

/// This member's part of one row, from before its forward pass to after its backward pass.
class PartOfRow {
 public:
  /// `row`: a MicroBatch of one row on the CPU. `group` must outlive the part.
  PartOfRow(const MicroBatch& row, dist::Group& group);
  PartOfRow(const PartOfRow&) = delete;
  PartOfRow& operator=(const PartOfRow&) = delete;

  const MicroBatch& here() const { return here_; }
  PartPass* pass() { return &pass_; }
  /// After the backward pass: gradients of the parameters, of which some may be undefined as other
  /// stages have them, are the whole row's in the pieces that are this member's.
  void collect(const model::Transformer& model,
               const std::vector<at::Tensor>& parameters,
               dist::Group& group,
               std::span<const CollectedPiece> pieces);

 private:
  model::RowPart part_;
  MicroBatch here_;
  PartPass pass_;
};

/// accumulate() of rows of which this rank computes one part each (model/row_part.h): leaves in
/// `sums`, row after row, the bits of the whole row's gradients in the pieces that are this
/// member's, and the whole row's measures on every member. All members have the same rows in the
/// same order. On the CPU, FP32 or BF16.
void accumulate_parts(const model::Transformer& model,
                      const MicroBatch& micro,
                      SharedRows& shared,
                      const StepCounts& counts,
                      const ObjectiveParams& params,
                      StepSums& sums);

}  // namespace hadal::train
