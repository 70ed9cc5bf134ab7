// The indexer's own objective (model.md 17.5): its scores against the attention that the heads
// pay to the blocks.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/cache/batch.h"

namespace hadal::ops {

struct IndexKl {
  /// [] FP32: KL summed over the queries with a visible block, on the CPU by the tree of sum_tree.h
  at::Tensor sum;
  int64_t num_queries = 0;  ///< how many those are
};

/// KL(target || softmax(scores)) over the blocks a query sees, where target(s) is proportional to
/// sum_h exp(q_h . block_s scale - lse_h): the joint softmax over window, blocks and sink,
/// restricted to blocks. Only `scores` is differentiated.
///   scores     [tokens, columns]          as index_scores gives them, -inf where not visible
///   selection  [tokens, k] I32            the sparse stage: only these blocks count;
///                                         undefined: every visible one
///   q          [tokens, heads, head_dim]  of the attention
///   blocks     rows [*, head_dim]         compressed
///   lse        [tokens, heads]
IndexKl index_kl(const at::Tensor& scores,
                 const at::Tensor& selection,
                 const at::Tensor& q,
                 const BlockView& blocks,
                 const at::Tensor& lse,
                 const Batch& batch,
                 int64_t ratio,
                 double scale);

/// What a choice of blocks keeps of the attention mass (as in index_kl) over the blocks a query
/// sees.
struct KeptMass {
  at::Tensor sum;   ///< [] FP32: the kept share, summed over the queries with a visible block
  at::Tensor best;  ///< [] FP32: the same for the best choice of as many blocks
  int64_t num_queries = 0;  ///< how many queries see a block
};

KeptMass selected_mass(const at::Tensor& selection,
                       const at::Tensor& q,
                       const BlockView& blocks,
                       const at::Tensor& lse,
                       const Batch& batch,
                       int64_t ratio,
                       double scale);

}  // namespace hadal::ops
