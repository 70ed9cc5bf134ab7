// A rank's part of a row, where several ranks share a row's places (docs/parallelism.md,
// docs/decisions/0030-parts-of-rows.md).
//
// Member i of C holds places i s to (i + 1) s - 1 of a row of C s tokens. s is 128 times a power of
// two, so what a member sums over its places is a node of the row's tree (ops/sum_tree.h).
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "dist/group.h"
#include "model/config.h"
#include "ops/cache/batch.h"

namespace hadal::model {

/// Rows before its part that a member is given: for the window, and for blocks that end in its part
/// but begin before it. A part is at least as long.
inline constexpr int64_t kHaloRows = 128;

/// InputError naming the number that does not fit unless rows of this length can be shared by so
/// many members with the bits of one: parts of 128 2^k places; window_size - 1, a ratio, and twice
/// a ratio of 4 no more than kHaloRows, which a ratio divides; four residual streams.
void check_context(const ModelConfig& config, int64_t row_length, int64_t members);

/// Plan of one row, the same on all members, and what they send to each other.
class RowPart {
 public:
  /// Samples of the whole row, in order. `group` must outlive the part; its members call the same
  /// functions in the same order.
  RowPart(std::vector<int64_t> sample_lengths, dist::Group& group);

  int64_t members() const { return group_->size(); }
  int64_t index() const { return group_->index(); }
  int64_t row_length() const { return row_length_; }
  /// This member's places [begin, end).
  int64_t begin() const { return index() * length_; }
  int64_t end() const { return begin() + length_; }
  /// Its runs of samples, the first one perhaps from a position > 0 on.
  const ops::Batch& batch() const { return batches_[static_cast<size_t>(index())]; }

  /// Position at which the first run of a member begins, and how many rows before it are sent
  /// there.
  int64_t start(int64_t member) const { return batches_[static_cast<size_t>(member)].start(0); }
  int64_t halo(int64_t member) const;
  /// Blocks that end in the part of `from` and belong to the sample that goes on in that of `to`,
  /// to > from. They are the last ones of `from`.
  int64_t shared_blocks(int64_t ratio, int64_t from, int64_t to) const;

  /// The sum over the members, on all of them: FP32 by the row's tree, each member's tensor being
  /// its node, or I64. Without gradients.
  at::Tensor sum(const at::Tensor& own) const;
  dist::Group& group() const { return *group_; }

 private:
  dist::Group* group_;
  int64_t row_length_ = 0, length_ = 0;
  std::vector<ops::Batch> batches_;  ///< of every member
};

}  // namespace hadal::model
