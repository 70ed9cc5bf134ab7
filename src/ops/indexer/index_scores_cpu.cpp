#include "ops/indexer/index_scores_cpu.h"

#include "ops/cache/packed_row.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

/// I[c] = sum_h relu(q_h . key_c) * w_h for 16 keys c, heads ascending in 16 sums, head by head in
/// turn, then the tree over these.
template <typename T>
F16 score_block(const IndexScoresCpuParams& p, const T* q, const T* w) {
  const auto round = [&](F16 x) { return p.round_bf16 ? cpu::round_bf16(x) : x; };
  const F16 zero = cpu::splat(0.0f);
  F16 sums[16];
  for (F16& sum : sums) sum = zero;
  for (int64_t head = 0; head < p.heads; ++head) {
    float dots[16], weight[16];
    cpu::dots16(q + head * p.dim, p.scratch, p.dim, dots);
    cpu::to_array(weight, cpu::load_n(w + head, 1));
    const F16 positive = cpu::max(round(cpu::load(dots)), zero);
    sums[head & 15] = sums[head & 15] + round(positive * cpu::splat(weight[0]));
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) sums[i] = sums[i] + sums[i + half];
  }
  return round(sums[0]);
}

template <typename T>
void score_keys(const IndexScoresCpuParams& p) {
  int64_t most = 0;
  for (int64_t t = 0; t < p.tokens; ++t) most = p.num_keys[t] > most ? p.num_keys[t] : most;
  for (int64_t first = 0; first < most; first += 16) {
    const int64_t count = most - first < 16 ? most - first : 16;
    for (int64_t key = 0; key < count; ++key) {
      const void* row = p.rows[first + key];
      if (p.format.packed()) {
        cpu::widen_packed(p.scratch + key * p.dim, static_cast<const uint8_t*>(row), p.format);
      } else {
        cpu::widen(p.scratch + key * p.dim, static_cast<const T*>(row), p.dim);
      }
    }
    for (int64_t t = 0; t < p.tokens; ++t) {
      const int64_t left = p.num_keys[t] - first;
      if (left <= 0) continue;
      const F16 scores = score_block(p, static_cast<const T*>(p.q) + t * p.heads * p.dim,
                                     static_cast<const T*>(p.w) + t * p.heads);
      cpu::store_n(p.scores + t * p.scores_row + first, scores, left < 16 ? left : 16);
    }
  }
}

void index_scores_tokens(const IndexScoresCpuParams& p) {
  if (p.dtype == ElementType::kF32) {
    score_keys<float>(p);
  } else {
    score_keys<uint16_t>(p);
  }
}

const bool filled = index_scores_cpu.fill(cpu::kIsa, index_scores_tokens);

}  // namespace
}  // namespace hadal::ops
