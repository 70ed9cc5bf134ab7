// What the kernels of sparse_attn_sm90.h share: queries to tiles, the fold's arithmetic, results.
// Device code for sm_90a only.
#pragma once

#include <cuda_bf16.h>

#include "ops/attention/attn_chunks_sm90.cuh"
#include "ops/attention/sparse_attn_sm90.h"
#include "ops/cuda/elementwise.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"

namespace hadal::ops::cuda {

/// Copies the 64 heads from `q` on to a tile, by kThreads threads (a multiple of 64).
template <int kThreads>
__device__ __forceinline__ void load_queries(uint32_t tile, const uint16_t* q, int thread) {
  const int piece = thread % 64;
  const uint32_t slab = tile + piece / 8 * kSlabTile;
#pragma unroll
  for (int i = 0; i < 4096 / kThreads; ++i) {
    const int row = thread / 64 + i * (kThreads / 64);
    copy_async16(slab + slab_offset(row, piece % 8), q + thread * 8 + i * kThreads * 8);
  }
}

/// exp_exact of x <= 0 (or minus infinity): the same bits with fewer instructions.
__device__ __forceinline__ float exp_below(float x) {
  const float clamped = fmaxf(x, -87.0f);
  // 1.5 * 2^23 rounds to an integer, which then lies in the lowest bits.
  const float shifted = clamped * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  float r = fmaf(n, -0.693359375f, clamped);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  const float result = __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
  return x < -87.0f ? 0.0f : result;
}

/// The running fold of the thread's two rows of a tile (row warp * 16 + lane / 4, and 8 below).
struct AttnState {
  float max[2], sum[2];
};

__device__ __forceinline__ float quad_largest(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

/// Scores become logits; those of places without a row minus infinity.
__device__ __forceinline__ void to_logits(float (&s)[32], uint64_t present, float scale) {
#pragma unroll
  for (int i = 0; i < 32; ++i) s[i] = s[i] * scale;
  if (present == ~uint64_t{0}) return;
  const uint64_t mine = present >> (threadIdx.x % 4 * 2);
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const uint32_t word = static_cast<uint32_t>(i < 16 ? mine : mine >> 32);
    if ((word >> (i / 4 % 4 * 8 + i % 2) & 1) == 0) s[i] = -INFINITY;
  }
}

/// The largest logit of each of the thread's rows.
__device__ __forceinline__ void row_largest(const float (&s)[32], float (&largest)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float most = s[half * 2];
#pragma unroll
    for (int i = 0; i < 32; ++i)
      if ((i >> 1 & 1) == half) most = fmaxf(most, s[i]);
    largest[half] = quad_largest(most);
  }
}

/// Minus infinity, where no key was met, would make differences of no meaning.
__device__ __forceinline__ float fold_base(float max) { return max == -INFINITY ? 0.0f : max; }

/// Sums over the lanes' tree of the thread's two rows; lanes: [row][lane / 8][lane % 2].
__device__ __forceinline__ void join_lanes(const float (&lanes)[2][2][2], float (&sums)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float even = lanes[half][0][0] + lanes[half][1][0];
    float uneven = lanes[half][0][1] + lanes[half][1][1];
#pragma unroll
    for (int step = 2; step > 0; --step) {
      even = even + __shfl_xor_sync(0xffffffffu, even, step);
      uneven = uneven + __shfl_xor_sync(0xffffffffu, uneven, step);
    }
    sums[half] = even + uneven;
  }
}

/// Logits become weights by the maximum `max`; keep(group, words) takes their BF16 values, sixteen
/// keys at a time, as operand A; sums: of the chunk, in the lanes' tree.
template <typename Keep>
__device__ __forceinline__ void to_weights(const float (&s)[32],
                                           const float (&max)[2],
                                           float (&sums)[2],
                                           Keep keep) {
  const float base[2] = {fold_base(max[0]), fold_base(max[1])};
  float lanes[2][2][2];  // join_lanes
#pragma unroll
  for (int group = 0; group < 4; ++group) {  // of sixteen keys
    float e[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      e[i] = exp_below(s[group * 8 + i] - base[i >> 1 & 1]);
      float& lane = lanes[i >> 1 & 1][i >> 2][i & 1];
      lane = group == 0 ? e[i] : lane + e[i];
    }
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(e[i * 2], e[i * 2 + 1]);
      words[i] = *reinterpret_cast<const uint32_t*>(&pair);
    }
    keep(group, words);
  }
  join_lanes(lanes, sums);
}

/// Rows of an accumulator times their factor; nothing to do where all are 1.
template <int kCount>
__device__ __forceinline__ void rescale_rows(float (&o)[kCount], const float (&factor)[2]) {
  if (__all_sync(0xffffffffu, factor[0] == 1.0f && factor[1] == 1.0f)) return;
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] = o[i] * factor[i >> 1 & 1];
}

/// Four words of each lane of a quad, transposed: lane q then holds word q of the lanes 0 to 3.
__device__ __forceinline__ uint4 transpose_quad(const uint32_t (&w)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
  uint32_t a[4];
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? w[i] : w[i + 1], 1);
    a[i] = odd ? got : w[i];
    a[i + 1] = odd ? w[i + 1] : got;
  }
  uint32_t b[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? a[i] : a[i + 2], 2);
    b[i] = upper ? got : a[i];
    b[i + 2] = upper ? a[i + 2] : got;
  }
  return make_uint4(b[0], b[1], b[2], b[3]);
}

/// The descriptor of that lower half: the upper one is that of every tile, and adding to 64 bits
/// would cost carries.
__device__ __forceinline__ uint64_t tile_descriptor(uint32_t low) {
  return operand_descriptor(0) >> 32 << 32 | low;
}

/// s = 64 queries times 64 rows of a tile: one chain of 512.
__device__ __forceinline__ void multiply_scores(float (&s)[32], uint32_t q, uint32_t rows) {
  keep(s);
  wgmma_fence();
  const auto a = static_cast<uint32_t>(operand_descriptor(q));
  const auto b = static_cast<uint32_t>(operand_descriptor(rows));
#pragma unroll
  for (int step = 0; step < 32; ++step) {
    const int at = (step / 4 * kSlabTile + step % 4 * 32) / 16;
    Wgmma<64>::bf16(s, tile_descriptor(a + at), tile_descriptor(b + at), step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(s);
}

/// o += weights times kColumns value columns (64, or a multiple of 128); rows: the tile's first
/// slab of them.
template <int kColumns>
__device__ __forceinline__ void multiply_values(float (&o)[kColumns / 2],
                                                uint32_t (&w)[4][4],
                                                uint32_t rows) {
  constexpr int kWidth = kColumns < 128 ? kColumns : 128;
  keep(o);
#pragma unroll
  for (int i = 0; i < 16; ++i) asm volatile("" : "+r"(w[i / 4][i % 4])::"memory");
  wgmma_fence();
  const auto b = static_cast<uint32_t>(transposed_descriptor(rows, kSlabTile));
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int first = 0; first < kColumns; first += kWidth) {
      auto& part = *reinterpret_cast<float(*)[kWidth / 2]>(o + first / 2);
      Wgmma<kWidth>::bf16_transposed(
          part, w[step], tile_descriptor(b + (first / 64 * kSlabTile + step * 2048) / 16), 1);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  keep(o);
}

/// Where a fold's results go: the output, or a segment's place in scratch.
struct AttnResult {
  int segment, segments;
  int first_head;     ///< of the tile
  int64_t first_row;  ///< token * heads + first_head
};

/// Floats of scratch before the segments' maxima and sums.
__host__ __device__ inline int64_t scratch_stats(const SparseAttnSm90Params& p, int64_t segments) {
  return p.tokens * p.heads * segments * p.width;
}

/// Writes the thread's rows of 2 kCount columns from `column` on. `first`: these columns come with
/// the tile's maxima and sums.
template <int kCount>
__device__ __forceinline__ void write_rows(const SparseAttnSm90Params& p,
                                           const AttnResult& at,
                                           const float (&o)[kCount],
                                           const AttnState& state,
                                           int column,
                                           bool first) {
  const int t = static_cast<int>(threadIdx.x) % kWarpgroup, lane = t % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = t / 32 * 16 + t % 32 / 4 + half * 8;
    const int64_t row = at.first_row + head;
    if (at.segments > 1) {
      const int64_t slot = row * at.segments + at.segment;
      float* to = p.scratch + slot * kLatentDim + column + lane * 2;
#pragma unroll
      for (int i = 0; i < kCount; i += 4)
        *reinterpret_cast<float2*>(to + i * 2) = make_float2(o[i + half * 2], o[i + half * 2 + 1]);
      if (first && lane == 0)
        *reinterpret_cast<float2*>(p.scratch + scratch_stats(p, at.segments) + slot * 2) =
            make_float2(state.max[half], state.sum[half]);
      continue;
    }
    const bool any = state.max[half] != -INFINITY;
    const float denominator =
        any ? state.sum[half] + exp_exact(__ldg(p.sink + at.first_head + head) - state.max[half])
            : 0.0f;
    const float factor = any ? 1.0f / denominator : 0.0f;
#pragma unroll
    for (int i = 0; i < kCount; i += 16) {
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(o[i + j * 4 + half * 2] * factor,
                                                          o[i + j * 4 + half * 2 + 1] * factor);
        words[j] = *reinterpret_cast<const uint32_t*>(&pair);
      }
      *reinterpret_cast<uint4*>(p.out + row * kLatentDim + column + i * 2 + lane * 8) =
          transpose_quad(words);
    }
    if (first && lane == 0 && p.stats != nullptr) {
      p.stats[row * 2] = state.max[half];
      p.stats[row * 2 + 1] = denominator;
    }
  }
}

/// The kernel of few tokens; items: tokens times tiles times segments; wide: sixteen blocks an
/// item, not eight.
void sparse_attn_few(const SparseAttnSm90Params& p, int64_t items, bool wide, Stream stream);
/// The kernel of any width, format and number of heads.
void sparse_attn_any(const SparseAttnSm90Params& p, Stream stream);
/// Joins the segments that lie in p.scratch.
void join_segments(const SparseAttnSm90Params& p, int64_t segments, Stream stream);

}  // namespace hadal::ops::cuda
