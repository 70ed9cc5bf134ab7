// What the indexer's files share: which blocks a step can see, and the pass over them on the CPU.
// Private to this folder.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/cache/batch.h"
#include "ops/op.h"

namespace hadal::ops {

/// Blocks that the last token of a sequence sees.
inline int64_t visible_blocks(const Batch& batch, int64_t seq, int64_t ratio) {
  return (batch.start(seq) + batch.length(seq)) / ratio;
}
inline int64_t max_visible(const Batch& batch, int64_t ratio) {
  return batch.max_end_pos() / ratio;
}

/// Gets the scores of a token's visible blocks; called from many threads.
using UseScores = std::function<void(int64_t token, const float* scores, int64_t count)>;
/// Scores every token's visible blocks with the CPU kernel; in: q, w and the keys' rows as
/// index_scores() takes them.
void score_tokens(const std::vector<at::Tensor>& in,
                  const BlockView& keys,
                  const Batch& batch,
                  int64_t ratio,
                  Numerics numerics,
                  const UseScores& use);

}  // namespace hadal::ops
