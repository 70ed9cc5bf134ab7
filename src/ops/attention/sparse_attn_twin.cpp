#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/parallel.h"
#include "ops/attention/sparse_attn_sm90.h"
#include "ops/bf16.h"
#include "ops/exact_math.h"
#include "ops/gemm/hopper_twin.h"
#include "ops/gemm/operand_twin.h"

namespace hadal::ops {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// A latent as BF16 (kv_rows.h).
void widen(const uint8_t* row, int64_t width, uint16_t* out) {
  static const std::array<float, 256> kValues = [] {
    std::array<float, 256> values{};
    for (size_t code = 0; code < values.size(); ++code)
      values[code] = e4m3_value(static_cast<uint8_t>(code));
    return values;
  }();
  const int64_t rounded = width - kAttnRotary;
  const uint8_t* scales = row + rounded + 2 * kAttnRotary;
  for (int64_t first = 0; first < rounded; first += 64) {
    const float scale = std::ldexp(1.0f, scales[first / 64] - 127);
    for (int64_t i = first; i < first + 64; ++i) out[i] = round_bf16(kValues[row[i]] * scale);
  }
  std::memcpy(out + rounded, row + rounded, 2 * kAttnRotary);
}

/// Folds over chunks of all heads, not yet divided.
struct Fold {
  std::vector<float> max, sum;  // [heads]
  std::vector<float> acc;       // [heads, width]

  Fold(int64_t heads, int64_t width)
      : max(static_cast<size_t>(heads), kMinusInfinity),
        sum(static_cast<size_t>(heads)),
        acc(static_cast<size_t>(heads * width)) {}
};

/// Keys of a chunk; rows without one are zeros.
struct Chunk {
  bool present[kAttnChunk] = {}, any = false;
  std::vector<uint16_t> keys, values;  // [64, width] and [width, 64]

  /// Of the list from place `first` on.
  Chunk(const SparseAttnTwinTask& t, int64_t first, int64_t end)
      : keys(static_cast<size_t>(kAttnChunk * t.width)), values(keys.size()) {
    for (int64_t k = 0; k < kAttnChunk && first + k < end; ++k) {
      const uint8_t* row = t.rows[first + k];
      if (row == nullptr) continue;
      present[k] = any = true;
      uint16_t* key = keys.data() + k * t.width;
      if (t.format == AttnRows::kBf16) {
        std::memcpy(key, row, static_cast<size_t>(2 * t.width));
      } else {
        widen(row, t.width, key);
      }
      for (int64_t d = 0; d < t.width; ++d)
        values[static_cast<size_t>(d * kAttnChunk + k)] = key[d];
    }
  }
};

/// One head's maximum, sum and weights [64] BF16 for a chunk of logits; the factor of what was
/// folded before.
float fold_logits(
    const Chunk& chunk, const float* dots, float scale, float& max, float& sum, uint16_t* weights) {
  float logits[kAttnChunk], seen = max;
  for (int64_t k = 0; k < kAttnChunk; ++k) {
    logits[k] = chunk.present[k] ? dots[k] * scale : kMinusInfinity;
    seen = std::max(seen, logits[k]);
  }
  const float rescale = max == kMinusInfinity ? 0.0f : exp_exact(max - seen);
  float lanes[16] = {};
  for (int64_t k = 0; k < kAttnChunk; ++k) {
    const float weight = exp_exact(logits[k] - seen);
    lanes[k % 16] = lanes[k % 16] + weight;
    weights[k] = round_bf16(weight);
  }
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) lanes[i] = lanes[i] + lanes[i + half];
  }
  const float kept = sum * rescale;
  sum = kept + lanes[0];
  max = seen;
  return rescale;
}

void fold_chunk(Fold& fold, const SparseAttnTwinTask& t, const Chunk& chunk) {
  if (!chunk.any) return;  // all weights would be zero, and all factors one
  std::vector<float> dots(static_cast<size_t>(t.heads * kAttnChunk));
  twin_bf16_cpu({.w = chunk.keys.data(),
                 .x = t.q,
                 .y = dots.data(),
                 .outputs = kAttnChunk,
                 .rows = t.heads,
                 .in = t.width});
  std::vector<uint16_t> weights(dots.size());
  for (int64_t h = 0; h < t.heads; ++h) {
    const auto head = static_cast<size_t>(h);
    const float rescale = fold_logits(chunk, dots.data() + h * kAttnChunk, t.scale, fold.max[head],
                                      fold.sum[head], weights.data() + h * kAttnChunk);
    float* acc = fold.acc.data() + h * t.width;
    for (int64_t d = 0; d < t.width; ++d) acc[d] = acc[d] * rescale;
  }
  twin_bf16_cpu({.w = chunk.values.data(),
                 .x = weights.data(),
                 .y = fold.acc.data(),
                 .outputs = t.width,
                 .rows = t.heads,
                 .in = kAttnChunk,
                 .from = fold.acc.data()});
}

/// The later segment joins those before it: one head.
void join(Fold& total, const Fold& later, size_t head, size_t width) {
  if (later.max[head] == kMinusInfinity) return;
  float* acc = total.acc.data() + head * width;
  const float* other = later.acc.data() + head * width;
  if (total.max[head] == kMinusInfinity) {
    total.max[head] = later.max[head];
    total.sum[head] = later.sum[head];
    std::copy_n(other, width, acc);
    return;
  }
  const float seen = std::max(total.max[head], later.max[head]);
  const float a = exp_exact(total.max[head] - seen), b = exp_exact(later.max[head] - seen);
  const float kept = total.sum[head] * a;
  total.sum[head] = std::fma(later.sum[head], b, kept);
  total.max[head] = seen;
  for (size_t d = 0; d < width; ++d) acc[d] = std::fma(other[d], b, acc[d] * a);
}

/// One head with the sink, divided and rounded.
void finish(const Fold& total, size_t head, size_t width, float sink, uint16_t* out, float* stats) {
  stats[0] = total.max[head];
  stats[1] = 0.0f;
  std::fill_n(out, width, uint16_t{0});
  if (total.max[head] == kMinusInfinity) return;
  stats[1] = total.sum[head] + exp_exact(sink - total.max[head]);
  const float factor = 1.0f / stats[1];
  const float* acc = total.acc.data() + head * width;
  for (size_t d = 0; d < width; ++d) out[d] = round_bf16(acc[d] * factor);
}

}  // namespace

void sparse_attn_twin(const SparseAttnTwinTask& t) {
  const auto heads = static_cast<size_t>(t.heads), width = static_cast<size_t>(t.width);
  Fold total(t.heads, t.width);
  for (int64_t first = 0; first < t.places; first += kAttnSegment) {
    const int64_t end = std::min(first + kAttnSegment, t.places);
    Fold segment(t.heads, t.width);
    for (int64_t at = first; at < end; at += kAttnChunk) fold_chunk(segment, t, Chunk(t, at, end));
    for (size_t h = 0; h < heads; ++h) join(total, segment, h, width);
  }
  for (size_t h = 0; h < heads; ++h)
    finish(total, h, width, t.sink[h], t.out + h * width, t.stats + 2 * h);
}

void sparse_attn_step_twin(const SparseAttnSm90Params& p) {
  const int64_t bytes = attn_row_bytes(p.width, p.format);
  parallel_for(p.tokens, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> stats(static_cast<size_t>(2 * p.heads));
    for (int64_t token = begin; token < end; ++token) {
      std::vector<const uint8_t*> rows;
      const auto add = [&](const uint8_t* latents, const int32_t* list, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
          rows.push_back(list[i] < 0 ? nullptr : latents + list[i] * bytes);
      };
      add(p.window, p.window_row + token * p.window_places, p.window_places);
      add(p.blocks, p.block_row + token * p.block_places,
          p.num_blocks == nullptr ? p.block_places : p.num_blocks[token]);
      sparse_attn_twin({.q = p.q + token * p.heads * p.width,
                        .sink = p.sink,
                        .rows = rows.data(),
                        .heads = p.heads,
                        .places = static_cast<int64_t>(rows.size()),
                        .scale = p.scale,
                        .out = p.out + token * p.heads * p.width,
                        .stats = p.stats == nullptr ? stats.data() : p.stats + token * p.heads * 2,
                        .width = p.width,
                        .format = p.format});
    }
  });
}

}  // namespace hadal::ops
