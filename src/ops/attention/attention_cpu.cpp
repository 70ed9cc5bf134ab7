#include "ops/attention/attention_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

constexpr int64_t kChunk = 64;
constexpr float kMinusInfinity = -__builtin_inff();

/// Scratch of one token: chunk keys and the query in FP32, accumulators, logits, and per head max
/// and sum.
struct Scratch {
  float *keys, *q, *acc, *logits, *max, *sum;
  Scratch(float* memory, int64_t heads, int64_t dim) {
    keys = memory;
    q = keys + kChunk * dim;
    acc = q + heads * dim;
    logits = acc + heads * dim;
    max = logits + heads * kChunk;
    sum = max + heads;
  }
};

template <typename T>
void widen(float* out, const T* row, int64_t dim) {
  cpu::for_lanes(dim,
                 [&](int64_t i, int64_t n) { cpu::store_n(out + i, cpu::load_n(row + i, n), n); });
}

/// logits[h][k] = (q_h . key_k) * scale: each dot its own 16-lane accumulator along ascending
/// channels, then the tree.
void chunk_logits(const AttentionCpuParams& p, const Scratch& s, int64_t count) {
  for (int64_t head = 0; head < p.heads; ++head) {
    const float* q = s.q + head * p.dim;
    float* logits = s.logits + head * kChunk;
    int64_t key = 0;
    for (; key + 4 <= count; key += 4) {
      const float* k = s.keys + key * p.dim;
      F16 acc[4] = {cpu::splat(0.0f), cpu::splat(0.0f), cpu::splat(0.0f), cpu::splat(0.0f)};
      cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
        const F16 query = cpu::load_n(q + i, n);
        for (int r = 0; r < 4; ++r)
          acc[r] = cpu::fma(query, cpu::load_n(k + r * p.dim + i, n), acc[r]);
      });
      for (int r = 0; r < 4; ++r) logits[key + r] = cpu::sum(acc[r]) * p.scale;
    }
    for (; key < count; ++key) logits[key] = cpu::dot(q, s.keys + key * p.dim, p.dim) * p.scale;
  }
}

/// acc[h] = acc[h] * rescale + sum_k p[k] key_k, k ascending.
void add_values(const AttentionCpuParams& p,
                const Scratch& s,
                int64_t head,
                float rescale,
                const float* weights,
                int64_t count) {
  float* acc = s.acc + head * p.dim;
  int64_t i = 0;
  for (; i + 64 <= p.dim; i += 64) {
    F16 a[4];
    for (int r = 0; r < 4; ++r) a[r] = cpu::load(acc + i + r * 16) * cpu::splat(rescale);
    for (int64_t key = 0; key < count; ++key) {
      const F16 w = cpu::splat(weights[key]);
      const float* row = s.keys + key * p.dim + i;
      for (int r = 0; r < 4; ++r) a[r] = cpu::fma(w, cpu::load(row + r * 16), a[r]);
    }
    for (int r = 0; r < 4; ++r) cpu::store(acc + i + r * 16, a[r]);
  }
  for (; i < p.dim; i += 16) {
    const int64_t n = p.dim - i < 16 ? p.dim - i : 16;
    F16 a = cpu::load_n(acc + i, n) * cpu::splat(rescale);
    for (int64_t key = 0; key < count; ++key) {
      a = cpu::fma(cpu::splat(weights[key]), cpu::load_n(s.keys + key * p.dim + i, n), a);
    }
    cpu::store_n(acc + i, a, n);
  }
}

float exp_scalar(float x) {
  float lanes[16];
  cpu::to_array(lanes, cpu::exp(cpu::splat(x)));
  return lanes[0];
}

/// max, rescale, exp, FP32 sum, weights into the value product (reference: fold_chunk)
void fold_chunk(const AttentionCpuParams& p, const Scratch& s, int64_t count) {
  chunk_logits(p, s, count);
  for (int64_t head = 0; head < p.heads; ++head) {
    float* logits = s.logits + head * kChunk;
    for (int64_t k = count; k < kChunk; ++k) logits[k] = kMinusInfinity;
    F16 highest = cpu::splat(s.max[head]);
    for (int64_t k = 0; k < kChunk; k += 16) highest = cpu::max(cpu::load(logits + k), highest);
    const float seen = cpu::max_lane(highest);
    const float rescale = s.max[head] == kMinusInfinity ? 0.0f : exp_scalar(s.max[head] - seen);
    // Four 16-lane sums of the chunk's 64 places are added in order before the tree.
    F16 total = cpu::splat(0.0f);
    for (int64_t k = 0; k < kChunk; k += 16) {
      const F16 weight = cpu::exp(cpu::load(logits + k) - cpu::splat(seen));
      total = total + weight;
      cpu::store(logits + k, p.round_probabilities ? cpu::round_bf16(weight) : weight);
    }
    s.sum[head] = s.sum[head] * rescale + cpu::sum(total);
    s.max[head] = seen;
    add_values(p, s, head, rescale, logits, count);
  }
}

template <typename T>
void attend(const AttentionCpuParams& p, const AttentionKeysCpu& keys) {
  const Scratch s(p.scratch, p.heads, p.dim);
  widen(s.q, static_cast<const T*>(p.q), p.heads * p.dim);
  for (int64_t i = 0; i < p.heads * p.dim; ++i) s.acc[i] = 0.0f;
  for (int64_t head = 0; head < p.heads; ++head) {
    s.max[head] = kMinusInfinity;
    s.sum[head] = 0.0f;
  }
  int64_t first = 0;
  for (int32_t chunk = 0; chunk < keys.num_chunks; ++chunk) {
    const int64_t count = keys.chunk_ends[chunk] - first;
    for (int64_t key = 0; key < count; ++key) {
      widen(s.keys + key * p.dim, static_cast<const T*>(keys.rows[first + key]), p.dim);
    }
    fold_chunk(p, s, count);
    first += count;
  }
  for (int64_t head = 0; head < p.heads; ++head) {
    float lanes[16] = {};
    lanes[0] = p.sink[head] - s.max[head];
    cpu::to_array(lanes, cpu::exp(cpu::load(lanes)));
    const float denominator = s.sum[head] + lanes[0];
    const F16 divisor = cpu::splat(denominator);
    T* out = static_cast<T*>(p.out) + head * p.dim;
    cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
      cpu::store_n(out + i, cpu::load_n(s.acc + head * p.dim + i, n) / divisor, n);
    });
    p.lse[head] = s.max[head] + static_cast<float>(__builtin_log(static_cast<double>(denominator)));
  }
}

void attention_token(const AttentionCpuParams& p, const AttentionKeysCpu& keys) {
  if (p.dtype == ElementType::kF32) {
    attend<float>(p, keys);
  } else {
    attend<uint16_t>(p, keys);
  }
}

float round_scalar(float x) { return cpu::bf16_to_float(cpu::float_to_bf16(x)); }

/// I[c] = sum_h relu(q_h . key_c) * w_h, heads ascending in four 16-lane sums, then the tree.
template <typename T>
void score_keys(const IndexScoresCpuParams& p) {
  const T* q = static_cast<const T*>(p.q);
  const T* w = static_cast<const T*>(p.w);
  for (int64_t key = 0; key < p.num_keys; ++key) {
    const T* row = static_cast<const T*>(p.rows[key]);
    float lanes[16] = {};
    for (int64_t head = 0; head < p.heads; ++head) {
      float dot = cpu::dot(q + head * p.dim, row, p.dim);
      float weight[16];
      cpu::to_array(weight, cpu::load_n(w + head, 1));
      if (p.round_bf16) dot = round_scalar(dot);
      float product = (dot > 0.0f ? dot : 0.0f) * weight[0];
      if (p.round_bf16) product = round_scalar(product);
      lanes[head & 15] = lanes[head & 15] + product;
    }
    const float total = cpu::sum(cpu::load(lanes));
    p.scores[key] = p.round_bf16 ? round_scalar(total) : total;
  }
}

void index_scores_token(const IndexScoresCpuParams& p) {
  if (p.dtype == ElementType::kF32) {
    score_keys<float>(p);
  } else {
    score_keys<uint16_t>(p);
  }
}

const bool filled_attention = attention_cpu.fill(cpu::kIsa, attention_token);
const bool filled_scores = index_scores_cpu.fill(cpu::kIsa, index_scores_token);

}  // namespace
}  // namespace hadal::ops
