#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "base/parallel.h"
#include "ops/bf16.h"
#include "ops/gemm/hopper_twin.h"
#include "ops/indexer/index_scores_sm90.h"
#include "ops/indexer/topk_twin.h"

namespace hadal::ops {
namespace {

float rounded_bf16(float x) { return bf16_value(round_bf16(x)); }

/// A row as the kernel folds it.
struct Folded {
  uint8_t codes[kIndexDim] = {};
  float scale = 0.0f;  ///< of a chain
  bool wide = false;
};

bool all_zeros(const uint8_t* group) {
  return std::all_of(group, group + 16, [](uint8_t byte) { return (byte & 0x77) == 0; });
}

Folded fold(const uint8_t* row) {
  // Groups of zeros have no say: they take the base.
  uint8_t scales[4];
  int base = 0, least = 255;
  for (int group = 0; group < 4; ++group) {
    if (all_zeros(row + group * 16)) continue;
    base = std::max<int>(base, row[64 + group]);
    least = std::min<int>(least, row[64 + group]);
  }
  if (base == 0) base = least = 127;
  for (int group = 0; group < 4; ++group)
    scales[group] = all_zeros(row + group * 16) ? static_cast<uint8_t>(base) : row[64 + group];
  Folded result;
  result.wide = !fold_fp4(row, scales, kIndexDim, result.codes, &result.scale);
  return result;
}

/// Value i of a row.
float element(const uint8_t* row, int64_t i) {
  constexpr float kValues[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const int code = row[i / 2] >> (i % 2 * 4) & 15;
  const float magnitude = std::ldexp(kValues[code & 7], row[64 + i / 32] - 127);
  return code & 8 ? -magnitude : magnitude;
}

/// Where the fold is not exact: products one after the other.
float wide_dot(const uint8_t* q, const uint8_t* key) {
  float sum = 0.0f;
  for (int64_t i = 0; i < kIndexDim; ++i) sum = std::fma(element(q, i), element(key, i), sum);
  return sum;
}

/// Chains of rows x with rows w, [x, w].
std::vector<float> chains(const std::vector<Folded>& x, const std::vector<Folded>& w) {
  const auto codes = [](const std::vector<Folded>& rows) {
    std::vector<uint8_t> all;
    for (const Folded& row : rows) all.insert(all.end(), row.codes, row.codes + kIndexDim);
    return all;
  };
  const std::vector<uint8_t> x_codes = codes(x), w_codes = codes(w);
  const std::vector<float> ones(std::max(x.size(), w.size()), 1.0f);
  std::vector<float> y(x.size() * w.size());
  twin_fp8_cpu({.w = w_codes.data(),
                .w_scale = ones.data(),
                .x = x_codes.data(),
                .x_scale = ones.data(),
                .y = y.data(),
                .outputs = static_cast<int64_t>(w.size()),
                .rows = static_cast<int64_t>(x.size()),
                .in = kIndexDim});
  return y;
}

/// The scores of one token's heads and keys.
void score(const uint8_t* q,
           const uint16_t* w,
           const std::vector<const uint8_t*>& keys,
           int64_t heads,
           uint16_t* scores) {
  std::vector<Folded> q_rows, key_rows;
  for (int64_t head = 0; head < heads; ++head) q_rows.push_back(fold(q + head * kIndexRowBytes));
  for (const uint8_t* key : keys) key_rows.push_back(fold(key));
  const std::vector<float> dots = chains(q_rows, key_rows);
  for (size_t k = 0; k < keys.size(); ++k) {
    float lanes[4] = {};
    for (size_t head = 0; head < q_rows.size(); ++head) {
      const Folded &a = q_rows[head], &b = key_rows[k];
      const float dot = a.wide || b.wide ? wide_dot(q + head * kIndexRowBytes, keys[k])
                                         : dots[head * keys.size() + k] * b.scale * a.scale;
      const float rounded = rounded_bf16(dot);
      lanes[head % 8 / 2] += rounded_bf16((rounded > 0.0f ? rounded : 0.0f) * bf16_value(w[head]));
    }
    scores[k] = round_bf16((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
  }
}

}  // namespace

float index_score_twin(const uint8_t* q, const uint16_t* w, const uint8_t* key, int64_t heads) {
  uint16_t result = 0;
  score(q, w, {key}, heads, &result);
  return bf16_value(result);
}

void index_scores_twin(const IndexScoresSm90Params& p) {
  parallel_for(p.tokens, 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int32_t* pages = p.pages + p.sequence[token] * p.max_pages;
      std::vector<const uint8_t*> keys;
      for (int64_t block = 0; block < p.visible[token]; ++block) {
        const int64_t row = pages[block / kIndexPageRows] * kIndexPageRows + block % kIndexPageRows;
        keys.push_back(p.keys + row * kIndexRowBytes);
      }
      score(p.q + token * p.heads * kIndexRowBytes, p.w + token * p.heads, keys, p.heads,
            p.scores + token * p.stride);
    }
  });
}

void index_topk_twin(const IndexTopkSm90Params& p) {
  for (int64_t token = 0; token < p.tokens; ++token) {
    const uint16_t* row = p.scores + token * p.stride;
    std::vector<float> scores(static_cast<size_t>(p.visible[token]));
    std::transform(row, row + scores.size(), scores.begin(), bf16_value);
    choose_blocks(std::move(scores), p.k, p.blocks + token * p.k);
  }
}

}  // namespace hadal::ops
