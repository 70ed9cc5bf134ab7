// Index scores of BF16 keys and the choice among FP32 scores on Hopper, as functions of pointers,
// and the scores' twin on the CPU. Numerics that round no score (index_scores.h has the
// definition); free of ATen.
//
// The tree. dot = one chain of 8 BF16 instructions from zero over the 128 channels
// (docs/decisions/0010-product-trees.md). max(dot, 0) * w is rounded to FP32; the heads are added
// as those of FP4 keys are (index_scores_sm90.h).
#pragma once

#include "ops/cache/row_tables.h"
#include "ops/indexer/index_scores_sm90.h"
#include "ops/kernel_types.h"

namespace hadal::ops {

struct IndexScoresBf16Sm90Params {
  const uint16_t* q;              ///< [tokens, heads, 128] BF16, 16-byte aligned, as keys
  const uint16_t* w;              ///< [tokens, heads] BF16
  const uint16_t* keys;           ///< [.., 128] BF16
  BlockRows rows;                 ///< of `keys`
  const int64_t* seq;             ///< [tokens]
  const int32_t* visible;         ///< [tokens] blocks to score, at most `stride`
  float* scores;                  ///< [tokens, stride]; written up to `visible`
  int64_t tokens, heads, stride;  ///< heads: serves_index_heads
};
void index_scores_bf16_sm90(const IndexScoresBf16Sm90Params& p, Stream stream);
/// The same on a CPU.
void index_scores_bf16_twin(const IndexScoresBf16Sm90Params& p);

/// The min(k, visible) blocks of the largest scores, ties to the lower block, NaN lowest, in
/// ascending order; then -1.
struct IndexTopkF32Sm90Params {
  const float* scores;        ///< [tokens, stride]
  const int32_t* visible;     ///< [tokens]
  int32_t* blocks;            ///< [tokens, k]
  int64_t tokens, stride, k;  ///< stride: a multiple of 4
};
void index_topk_f32_sm90(const IndexTopkF32Sm90Params& p, Stream stream);
/// The same on a CPU.
void index_topk_f32_twin(const IndexTopkF32Sm90Params& p);

/// The score of one query [heads, 128] and one key [128], with the bits of index_scores_bf16_sm90.
float index_score_bf16_twin(const uint16_t* q,
                            const uint16_t* w,
                            const uint16_t* key,
                            int64_t heads);

}  // namespace hadal::ops
