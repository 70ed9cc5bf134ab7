#include <algorithm>
#include <vector>

#include "base/parallel.h"
#include "ops/bf16.h"
#include "ops/gemm/hopper_twin.h"
#include "ops/indexer/index_bf16_sm90.h"
#include "ops/indexer/topk_twin.h"

namespace hadal::ops {
namespace {

/// The scores of one token's heads and keys.
void score(const uint16_t* q,
           const uint16_t* w,
           const std::vector<const uint16_t*>& keys,
           int64_t heads,
           float* scores) {
  std::vector<uint16_t> rows;
  for (const uint16_t* key : keys) rows.insert(rows.end(), key, key + kIndexDim);
  const auto count = static_cast<int64_t>(keys.size());
  std::vector<float> dots(static_cast<size_t>(heads * count));
  twin_bf16_cpu({.w = rows.data(),
                 .x = q,
                 .y = dots.data(),
                 .outputs = count,
                 .rows = heads,
                 .in = kIndexDim});
  for (int64_t k = 0; k < count; ++k) {
    float lanes[4] = {};
    for (int64_t head = 0; head < heads; ++head) {
      const float term =
          std::max(dots[static_cast<size_t>(head * count + k)], 0.0f) * bf16_value(w[head]);
      float& lane = lanes[head % 8 / 2];
      lane = lane + term;
    }
    scores[k] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
  }
}

}  // namespace

float index_score_bf16_twin(const uint16_t* q,
                            const uint16_t* w,
                            const uint16_t* key,
                            int64_t heads) {
  float result = 0.0f;
  score(q, w, {key}, heads, &result);
  return result;
}

void index_scores_bf16_twin(const IndexScoresBf16Sm90Params& p) {
  parallel_for(p.tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      std::vector<const uint16_t*> keys;
      for (int64_t block = 0; block < p.visible[token]; ++block)
        keys.push_back(p.keys + p.rows.row(p.seq[token], block) * kIndexDim);
      score(p.q + token * p.heads * kIndexDim, p.w + token * p.heads, keys, p.heads,
            p.scores + token * p.stride);
    }
  });
}

void index_topk_f32_twin(const IndexTopkF32Sm90Params& p) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    const float* scores = p.scores + token * p.stride;
    choose_blocks({scores, scores + p.visible[token]}, p.k, p.blocks + token * p.k);
  }
}

}  // namespace hadal::ops
