#include "ops/attention/attention_cpu.h"

#include "ops/cache/packed_row.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

constexpr int64_t kChunk = 64;
constexpr float kMinusInfinity = -__builtin_inff();

/// Scratch of one token: chunk keys and the query in FP32, accumulators, logits, and per head max,
/// sum and factor.
struct Scratch {
  float *keys, *q, *acc, *logits, *max, *sum, *rescale;
  Scratch(float* memory, int64_t heads, int64_t dim) {
    keys = memory;
    q = keys + kChunk * dim;
    acc = q + heads * dim;
    logits = acc + heads * dim;
    max = logits + heads * kChunk;
    sum = max + heads;
    rescale = sum + heads;
  }
};

/// logits[h][k] = (q_h . key_k) * scale: each dot its own 16-lane accumulator along ascending
/// channels, then the tree. Places beyond count, up to a multiple of 16, get numbers of no meaning.
void chunk_logits(const AttentionCpuParams& p, const Scratch& s, int64_t count) {
  const F16 scale = cpu::splat(p.scale);
  for (int64_t key = 0; key < count; key += 16) {
    for (int64_t head = 0; head < p.heads; ++head) {
      float* logits = s.logits + head * kChunk + key;
      cpu::dots16(s.q + head * p.dim, s.keys + key * p.dim, p.dim, logits);
      cpu::store(logits, cpu::load(logits) * scale);
    }
  }
}

#if defined(HADAL_ISA_avx512)
constexpr int kValueHeads = 3;  // heads that share a key's load: 12 accumulators of 32 registers
#else
constexpr int kValueHeads = 1;
#endif

/// acc[h] = acc[h] * rescale[h] + sum_k p[h][k] key_k, k ascending, for kHeads heads from `head`
/// on.
template <int kHeads>
void add_values(const AttentionCpuParams& p, const Scratch& s, int64_t head, int64_t count) {
  const float* weights = s.logits + head * kChunk;
  float* acc = s.acc + head * p.dim;
  int64_t i = 0;
  for (; i + 64 <= p.dim; i += 64) {
    F16 a[kHeads][4];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const F16 rescale = cpu::splat(s.rescale[head + h]);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) a[h][r] = cpu::load(acc + h * p.dim + i + r * 16) * rescale;
    }
    for (int64_t key = 0; key < count; ++key) {
      F16 row[4];
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) row[r] = cpu::load(s.keys + key * p.dim + i + r * 16);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) {
        const F16 w = cpu::splat(weights[h * kChunk + key]);
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) a[h][r] = cpu::fma(w, row[r], a[h][r]);
      }
    }
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) cpu::store(acc + h * p.dim + i + r * 16, a[h][r]);
    }
  }
  for (; i < p.dim; i += 16) {
    const int64_t n = p.dim - i < 16 ? p.dim - i : 16;
    for (int h = 0; h < kHeads; ++h) {
      F16 a = cpu::load_n(acc + h * p.dim + i, n) * cpu::splat(s.rescale[head + h]);
      for (int64_t key = 0; key < count; ++key) {
        const F16 w = cpu::splat(weights[h * kChunk + key]);
        a = cpu::fma(w, cpu::load_n(s.keys + key * p.dim + i, n), a);
      }
      cpu::store_n(acc + h * p.dim + i, a, n);
    }
  }
}

float exp_scalar(float x) {
  float lanes[16];
  cpu::to_array(lanes, cpu::exp(cpu::splat(x)));
  return lanes[0];
}

/// max, rescale, exp, FP32 sum: a head's logits become the weights of the value product.
void chunk_weights(const AttentionCpuParams& p, const Scratch& s, int64_t head, int64_t count) {
  float* logits = s.logits + head * kChunk;
  int64_t places = (count + 15) / 16 * 16;
  for (int64_t k = count; k < places; ++k) logits[k] = kMinusInfinity;
  F16 highest = cpu::splat(s.max[head]);
  for (int64_t k = 0; k < places; k += 16) highest = cpu::max(cpu::load(logits + k), highest);
  const float seen = cpu::max_lane(highest);
  if (seen == kMinusInfinity) {  // no usable logit: here alone the empty places have weights too
    for (; places < kChunk; ++places) logits[places] = kMinusInfinity;
  }
  const float rescale = s.max[head] == kMinusInfinity ? 0.0f : exp_scalar(s.max[head] - seen);
  // Four 16-lane sums of the chunk's 64 places are added in order before the tree.
  F16 total = cpu::splat(0.0f);
  for (int64_t k = 0; k < places; k += 16) {
    const F16 weight = cpu::exp(cpu::load(logits + k) - cpu::splat(seen));
    total = total + weight;
    cpu::store(logits + k, p.round_probabilities ? cpu::round_bf16(weight) : weight);
  }
  s.sum[head] = s.sum[head] * rescale + cpu::sum(total);
  s.max[head] = seen;
  s.rescale[head] = rescale;
}

/// Adds a chunk (reference: fold_chunk).
void fold_chunk(const AttentionCpuParams& p, const Scratch& s, int64_t count) {
  chunk_logits(p, s, count);
  for (int64_t head = 0; head < p.heads; ++head) chunk_weights(p, s, head, count);
  int64_t head = 0;
  for (; head + kValueHeads <= p.heads; head += kValueHeads)
    add_values<kValueHeads>(p, s, head, count);
  for (; head < p.heads; ++head) add_values<1>(p, s, head, count);
}

template <typename T>
void attend(const AttentionCpuParams& p, const AttentionKeysCpu& keys) {
  const Scratch s(p.scratch, p.heads, p.dim);
  cpu::widen(s.q, static_cast<const T*>(p.q), p.heads * p.dim);
  for (int64_t i = 0; i < p.heads * p.dim; ++i) s.acc[i] = 0.0f;
  for (int64_t head = 0; head < p.heads; ++head) {
    s.max[head] = kMinusInfinity;
    s.sum[head] = 0.0f;
  }
  int64_t first = 0;
  for (int32_t chunk = 0; chunk < keys.num_chunks; ++chunk) {
    const int64_t count = keys.chunk_ends[chunk] - first;
    for (int64_t key = 0; key < count; ++key) {
      const void* row = keys.rows[first + key];
      if (keys.packed != nullptr && keys.packed[first + key]) {
        cpu::widen_packed(s.keys + key * p.dim, static_cast<const uint8_t*>(row), p.format);
      } else {
        cpu::widen(s.keys + key * p.dim, static_cast<const T*>(row), p.dim);
      }
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

const bool filled_attention = attention_cpu.fill(cpu::kIsa, attention_token);

}  // namespace
}  // namespace hadal::ops
