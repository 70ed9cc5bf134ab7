#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "ops/attention/sparse_attn_sm90.h"
#include "ops/exact_math.h"
#include "ops/gemm/hopper_twin.h"

namespace hadal::ops {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

uint16_t round_bf16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

/// A latent as BF16 (kv_rows.h).
void widen(const uint8_t* row, int64_t width, uint16_t* out) {
  const int64_t rounded = width - kAttnRotary;
  const uint8_t* scales = row + rounded + 2 * kAttnRotary;
  for (int64_t i = 0; i < rounded; ++i) {
    const int code = row[i], field = code >> 3 & 15, fraction = code & 7;
    const float magnitude = field == 0 ? std::ldexp(static_cast<float>(fraction), -9)
                                       : std::ldexp(static_cast<float>(8 + fraction), field - 10);
    const float value = std::ldexp(magnitude, scales[i / 64] - 127);
    out[i] = round_bf16(code & 0x80 ? -value : value);
  }
  std::memcpy(out + rounded, row + rounded, 2 * kAttnRotary);
}

/// A fold over chunks: not yet divided.
struct Fold {
  float max = kMinusInfinity, sum = 0.0f;
  std::vector<float> acc;  // [width]
};

/// Keys of a chunk; rows without one are zeros.
struct Chunk {
  int64_t width;
  std::vector<uint16_t> keys = std::vector<uint16_t>(static_cast<size_t>(kAttnChunk * width));
  bool present[kAttnChunk] = {};
  uint16_t* key(int64_t k) { return keys.data() + k * width; }
  const uint16_t* key(int64_t k) const { return keys.data() + k * width; }
};

float dot(const uint16_t* q, const uint16_t* key, int64_t width) {
  float chain = 0.0f;
  for (int64_t k = 0; k < width; k += 16) chain = wgmma_bf16(q + k, key + k, chain);
  return chain;
}

void fold_chunk(Fold& fold, const uint16_t* q, const Chunk& chunk, float scale) {
  float logits[kAttnChunk], seen = fold.max;
  for (int64_t k = 0; k < kAttnChunk; ++k) {
    logits[k] = chunk.present[k] ? dot(q, chunk.key(k), chunk.width) * scale : kMinusInfinity;
    seen = std::max(seen, logits[k]);
  }
  if (seen == kMinusInfinity) return;
  const float rescale = fold.max == kMinusInfinity ? 0.0f : exp_exact(fold.max - seen);
  float lanes[16] = {};
  uint16_t weights[kAttnChunk];
  for (int64_t k = 0; k < kAttnChunk; ++k) {
    const float weight = exp_exact(logits[k] - seen);
    lanes[k % 16] = lanes[k % 16] + weight;
    weights[k] = round_bf16(weight);
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
  }
  const float kept = fold.sum * rescale;
  fold.sum = kept + lanes[0];
  fold.max = seen;
  for (int64_t d = 0; d < chunk.width; ++d) {
    float& sum = fold.acc[static_cast<size_t>(d)];
    sum = sum * rescale;
    for (int64_t first = 0; first < kAttnChunk; first += 16) {
      uint16_t values[16];
      for (int64_t k = 0; k < 16; ++k) values[k] = chunk.key(first + k)[d];
      sum = wgmma_bf16(weights + first, values, sum);
    }
  }
}

/// Chunk of the list from place `first` on.
void load_chunk(Chunk& chunk, const SparseAttnTwinTask& t, int64_t first, int64_t end) {
  for (int64_t k = 0; k < kAttnChunk; ++k) {
    const uint8_t* row = first + k < end ? t.rows[first + k] : nullptr;
    chunk.present[k] = row != nullptr;
    if (row == nullptr) {
      std::fill_n(chunk.key(k), t.width, uint16_t{0});
    } else if (t.format == AttnRows::kBf16) {
      std::memcpy(chunk.key(k), row, static_cast<size_t>(2 * t.width));
    } else {
      widen(row, t.width, chunk.key(k));
    }
  }
}

/// The later segment joins those before it.
void join(Fold& total, const Fold& later) {
  if (later.max == kMinusInfinity) return;
  if (total.max == kMinusInfinity) {
    total = later;
    return;
  }
  const float seen = std::max(total.max, later.max);
  const float a = exp_exact(total.max - seen), b = exp_exact(later.max - seen);
  const float kept = total.sum * a;
  total.sum = std::fma(later.sum, b, kept);
  total.max = seen;
  for (size_t d = 0; d < total.acc.size(); ++d)
    total.acc[d] = std::fma(later.acc[d], b, total.acc[d] * a);
}

/// With the sink, divided and rounded.
void finish(const Fold& total, float sink, uint16_t* out, float* stats) {
  stats[0] = total.max;
  stats[1] = 0.0f;
  std::fill_n(out, total.acc.size(), uint16_t{0});
  if (total.max == kMinusInfinity) return;
  stats[1] = total.sum + exp_exact(sink - total.max);
  const float factor = 1.0f / stats[1];
  for (size_t d = 0; d < total.acc.size(); ++d) out[d] = round_bf16(total.acc[d] * factor);
}

}  // namespace

void sparse_attn_twin(const SparseAttnTwinTask& t) {
  Chunk chunk{.width = t.width};
  const Fold nothing{.acc = std::vector<float>(static_cast<size_t>(t.width))};
  std::vector<Fold> total(static_cast<size_t>(t.heads), nothing);
  for (int64_t first = 0; first < t.places; first += kAttnSegment) {
    const int64_t end = std::min(first + kAttnSegment, t.places);
    std::vector<Fold> segment(total.size(), nothing);
    for (int64_t at = first; at < end; at += kAttnChunk) {
      load_chunk(chunk, t, at, end);
      for (int64_t h = 0; h < t.heads; ++h)
        fold_chunk(segment[static_cast<size_t>(h)], t.q + h * t.width, chunk, t.scale);
    }
    for (size_t h = 0; h < total.size(); ++h) join(total[h], segment[h]);
  }
  for (int64_t h = 0; h < t.heads; ++h)
    finish(total[static_cast<size_t>(h)], t.sink[h], t.out + h * t.width, t.stats + 2 * h);
}

}  // namespace hadal::ops
