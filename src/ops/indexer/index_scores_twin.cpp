#include <algorithm>
#include <bit>
#include <cmath>

#include "ops/gemm/hopper_twin.h"
#include "ops/indexer/index_scores_sm90.h"

namespace hadal::ops {
namespace {

float bf16_value(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

float round_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return x;
  return std::bit_cast<float>((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u);
}

/// A row as the kernel folds it.
struct Folded {
  uint8_t codes[kIndexDim];
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

float dot(const uint8_t* q, const Folded& q_folded, const uint8_t* key, const Folded& key_folded) {
  if (q_folded.wide || key_folded.wide) {
    float sum = 0.0f;
    for (int64_t i = 0; i < kIndexDim; ++i) sum = std::fma(element(q, i), element(key, i), sum);
    return sum;
  }
  float chain = 0.0f;
  for (int64_t k = 0; k < kIndexDim; k += 32)
    chain = wgmma_e4m3(key_folded.codes + k, q_folded.codes + k, chain);
  return chain * key_folded.scale * q_folded.scale;
}

}  // namespace

float index_score_twin(const uint8_t* q, const uint16_t* w, const uint8_t* key, int64_t heads) {
  const Folded key_folded = fold(key);
  float lanes[4] = {};
  for (int64_t head = 0; head < heads; ++head) {
    const uint8_t* row = q + head * kIndexRowBytes;
    const float rounded = round_bf16(dot(row, fold(row), key, key_folded));
    lanes[head % 8 / 2] += round_bf16((rounded > 0.0f ? rounded : 0.0f) * bf16_value(w[head]));
  }
  return round_bf16((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]));
}

}  // namespace hadal::ops
