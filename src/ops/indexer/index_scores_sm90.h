// Index scores and the choice among them on Hopper, as functions of pointers, and the scores' twin
// on the CPU. `released` numerics (index_scores.h has the definition); free of ATen.
//
// The tree. Queries and keys are rows of 128 FP4 values (kv_rows.h, 68 bytes). Each row folds into
// E4M3 as weights do (docs/decisions/0010): its base is the largest scale of a group that is not
// all zeros. dot = chain of 128 * 2^(base of key) * 2^(base of query). Where one of the two rows
// has scales further apart than 2^14, that dot is the sum of its 128 products by fused
// multiply-adds in ascending order instead. Then dot, max(dot, 0) * w are rounded to BF16, and the
// heads are added in FP32: lane l of 4 takes heads 2 l and 2 l + 1, 8 + 2 l, ..., ascending; then
// (lane 0 + lane 1) + (lane 2 + lane 3); rounded to BF16.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

inline constexpr int64_t kIndexDim = 128, kIndexRowBytes = 68, kIndexPageRows = 64;

/// Heads of a query that the kernel holds.
constexpr bool serves_index_heads(int64_t heads) { return heads >= 1 && heads <= 64; }

struct IndexScoresSm90Params {
  const uint8_t* q;         ///< [tokens, heads, 68]
  const uint16_t* w;        ///< [tokens, heads] BF16
  const uint8_t* keys;      ///< pages of 64 rows of 68 bytes, one after the other
  const int32_t* pages;     ///< [sequences, max_pages] page numbers in order of blocks
  const int32_t* sequence;  ///< [tokens]
  const int32_t* visible;   ///< [tokens] blocks to score, at most 64 * max_pages
  uint16_t* scores;         ///< [tokens, stride] BF16; written up to `visible`
  int64_t tokens, heads, max_pages, stride;  ///< heads: serves_index_heads
};
void index_scores_sm90(const IndexScoresSm90Params& p, Stream stream);
/// The same on a CPU.
void index_scores_twin(const IndexScoresSm90Params& p);

/// The min(k, visible) blocks of the largest scores, ties to the lower block, NaN lowest, in
/// ascending order; then -1.
struct IndexTopkSm90Params {
  const uint16_t* scores;     ///< [tokens, stride] BF16
  const int32_t* visible;     ///< [tokens]
  int32_t* blocks;            ///< [tokens, k]
  int64_t tokens, stride, k;  ///< stride: a multiple of 8
};
void index_topk_sm90(const IndexTopkSm90Params& p, Stream stream);
/// The same on a CPU.
void index_topk_twin(const IndexTopkSm90Params& p);

/// The score of one query (all heads) and one key, with the bits of index_scores_sm90.
float index_score_twin(const uint8_t* q, const uint16_t* w, const uint8_t* key, int64_t heads);

}  // namespace hadal::ops
