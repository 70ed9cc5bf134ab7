// What the kernels of sparse_attn_sm90.h share: lists, latents to operands, the fold's arithmetic.
// Device code for sm_90a only.
//
// Tiles. 64 rows of 512 BF16 values lie as 8 slabs of 64 channels, each 64 rows of 128 bytes whose
// 16-byte pieces are swizzled (sm90_layout.h): operand_descriptor reads rows as keys of the scores,
// transposed_descriptor the same bytes as values.
#pragma once

#include <cuda_bf16.h>

#include "ops/attention/sparse_attn_sm90.h"
#include "ops/cuda/elementwise.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"

namespace hadal::ops::cuda {

inline constexpr int kAttnHeads = 64;  ///< heads of a tile
inline constexpr int kSlabTile = 64 * 128, kLatentTile = 8 * kSlabTile;
inline constexpr int kRowBytes = static_cast<int>(kLatentRowBytes);

/// Byte offset in a slab of piece `piece` of row `row`.
__device__ __forceinline__ uint32_t slab_offset(int row, int piece) {
  return static_cast<uint32_t>(row * 128 + ((piece ^ (row & 7)) << 4));
}

/// A chunk of a list: 64 places of the window or of the compressed rows, never of both.
struct AttnSource {
  const uint8_t* rows;
  const int32_t* numbers;
  int held, left;  ///< places behind it in memory, and those that count
  /// The number of a place's row; negative: none.
  __device__ __forceinline__ int32_t number(int place) const {
    return place < left ? __ldg(numbers + place) : -1;
  }
  /// The same, on its way before `left` is known.
  __device__ __forceinline__ int32_t early_number(int place) const {
    const int32_t number = place < held ? __ldg(numbers + place) : -1;
    return place < left ? number : -1;
  }
};

/// One token's list.
struct AttnList {
  const int32_t *window_row, *block_row;
  int window_places, held;
  int places;  ///< places beyond have no row

  __device__ __forceinline__ AttnList(const SparseAttnSm90Params& p, int64_t token)
      : window_row(p.window_row + token * p.window_places),
        block_row(p.block_row + token * p.block_places - p.window_places),
        window_places(static_cast<int>(p.window_places)) {
    held = static_cast<int>(p.window_places + p.block_places);
    places = held;
    if (p.num_blocks != nullptr) places = min(held, window_places + p.num_blocks[token]);
  }
  /// The chunk at `place`.
  __device__ __forceinline__ AttnSource chunk(const SparseAttnSm90Params& p, int place) const {
    const bool in_window = place < window_places;
    return {in_window ? p.window : p.blocks, (in_window ? window_row : block_row) + place,
            held - place, places - place};
  }
};

/// The latent of a number. Where there is none: any memory that may be read.
__device__ __forceinline__ const uint8_t* latent(const SparseAttnSm90Params& p,
                                                 const uint8_t* rows,
                                                 int32_t number) {
  const uint8_t* any = reinterpret_cast<const uint8_t*>(p.q);
  return number < 0 ? any : rows + static_cast<int64_t>(number) * kRowBytes;
}
/// As assembly that keeps its place: the compiler would move it behind the wait for a free buffer.
__device__ __forceinline__ uint2 load_codes(const uint8_t* from) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(from));
  return v;
}

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t d;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}

/// Four E4M3 codes as pairs of BF16 numbers 2^-120 times as large: a code's sign goes to the top,
/// the rest four bits up.
__device__ __forceinline__ uint2 widen_four(uint32_t codes) {
  const uint32_t low = codes << 4 & 0xf0f0f0f0u;
  const uint32_t high = (codes >> 4 & 0x07070707u) | (codes & 0x80808080u);
  return make_uint2(__byte_perm(low, high, 0x5140), __byte_perm(low, high, 0x7362));
}

/// Eight E4M3 codes times 2^-120 times `factor` (two BF16 values alike), exactly.
__device__ __forceinline__ uint4 widen_codes(uint2 codes, uint32_t factor) {
  const uint2 first = widen_four(codes.x), second = widen_four(codes.y);
  return make_uint4(multiply_bf16(first.x, factor), multiply_bf16(first.y, factor),
                    multiply_bf16(second.x, factor), multiply_bf16(second.y, factor));
}
/// Eight E4M3 codes times 2^(scale - 127) for any scale: 2^(scale - 7) may be no BF16 number.
__device__ __forceinline__ uint4 widen_any_codes(uint2 codes, uint32_t scale) {
  const uint4 v = widen_codes(codes, min(scale + 120, 254u) * 0x00800080u);
  const uint32_t rest = max(scale, 134u) * 0x00800080u - 7 * 0x00800080u;
  return make_uint4(multiply_bf16(v.x, rest), multiply_bf16(v.y, rest), multiply_bf16(v.z, rest),
                    multiply_bf16(v.w, rest));
}
/// Whether one of four scales is beyond 134.
__device__ __forceinline__ bool any_large(uint32_t scales) {
  return (((scales & 0x7f7f7f7fu) + 0x79797979u) & scales & 0x80808080u) != 0;
}
/// Factors of widen_codes for four scales of at most 134, as exponents in their bytes.
__device__ __forceinline__ uint32_t scale_exponents(uint32_t scales) {
  return scales + 0x78787878u;
}
/// Byte `slab` of eight, as widen_codes wants it.
__device__ __forceinline__ uint32_t slab_factor(uint2 exponents, int slab) {
  const uint32_t byte = static_cast<uint32_t>(slab % 4);
  return __byte_perm(slab < 4 ? exponents.x : exponents.y, 0, 0x4040 | byte | byte << 8) << 7;
}

__device__ __forceinline__ void copy_async16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void copy_async_wait_all() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}
__device__ __forceinline__ void store16(uint32_t to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

/// A chunk of latents on its way from memory to a tile, in the registers of 256 threads. Thread t
/// has piece t % 8 of every slab of two rows: t / 32 * 8 + t % 32 / 8, and 4 below.
class LatentChunk {
 public:
  __device__ __forceinline__ explicit LatentChunk(int thread) : t(thread) {
    for (int u = 0; u < 2; ++u) offset[u] = slab_offset(row(u), t % 8);
  }

  /// Row u of the thread's.
  __device__ __forceinline__ int row(int u) const { return t / 32 * 8 + t % 32 / 8 + u * 4; }
  /// Numbers of the thread's rows.
  __device__ __forceinline__ void find(const AttnSource& source, int32_t (&number)[2]) const {
#pragma unroll
    for (int u = 0; u < 2; ++u) number[u] = source.number(row(u));
  }
  __device__ __forceinline__ void fetch(const SparseAttnSm90Params& p,
                                        const uint8_t* rows,
                                        const int32_t (&number)[2]) {
    bits = 0;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const uint32_t votes = __ballot_sync(0xffffffffu, number[u] >= 0);
      bits |= ((votes & 1) | (votes >> 7 & 2) | (votes >> 14 & 4) | (votes >> 21 & 8)) << (u * 4);
      const uint8_t* from = latent(p, rows, number[u]);
      scales[u] = load_codes(from + 576);
      from += t % 8 * 8;
#pragma unroll
      for (int slab = 0; slab < 7; ++slab) codes[u][slab] = load_codes(from + slab * 64);
      from += t % 8 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) rotary[u][i] = load_codes(from + 448 + i * 8);
    }
  }
  /// Widens it into a tile; `present`: which rows there are.
  __device__ __forceinline__ void store(uint32_t tile, uint64_t* present) const {
    if (t % 32 == 0) reinterpret_cast<uint8_t*>(present)[t / 32] = static_cast<uint8_t>(bits);
    bool large = false;
#pragma unroll
    for (int u = 0; u < 2; ++u)
      large = large || (here(u) && (any_large(scales[u].x) || any_large(scales[u].y)));
    const bool general = __any_sync(0xffffffffu, large);
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const uint32_t to = tile + offset[u];
      const bool any = here(u);
      const auto rotary_piece = [&] {
        return any ? make_uint4(rotary[u][0].x, rotary[u][0].y, rotary[u][1].x, rotary[u][1].y)
                   : make_uint4(0, 0, 0, 0);
      };
      if (!general) {
        const uint2 exponents = make_uint2(any ? scale_exponents(scales[u].x) : 0,
                                           any ? scale_exponents(scales[u].y) : 0);
        // Two at a time: one alone waits for its own instructions.
#pragma unroll
        for (int slab = 0; slab < 8; slab += 2) {
          const uint4 v = widen_codes(codes[u][slab], slab_factor(exponents, slab));
          const uint4 w =
              slab == 6 ? rotary_piece()
                        : widen_codes(codes[u][(slab + 1) % 7], slab_factor(exponents, slab + 1));
          store16(to + slab * kSlabTile, v);
          store16(to + (slab + 1) * kSlabTile, w);
        }
      } else {
#pragma unroll
        for (int slab = 0; slab < 7; ++slab) {
          const uint32_t scale = (slab < 4 ? scales[u].x : scales[u].y) >> (slab % 4 * 8) & 255;
          store16(to + slab * kSlabTile,
                  any ? widen_any_codes(codes[u][slab], scale) : make_uint4(0, 0, 0, 0));
        }
        store16(to + 7 * kSlabTile, rotary_piece());
      }
    }
  }

 private:
  __device__ __forceinline__ bool here(int u) const { return bits >> (t % 32 / 8 + u * 4) & 1; }

  int t;
  uint32_t offset[2];
  uint32_t bits;  ///< which of the warp's eight rows there are
  uint2 codes[2][7], scales[2], rotary[2][2];
};

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

/// Logits become weights by the maximum `max`; keep(group, words) takes their BF16 values, sixteen
/// keys at a time, as operand A; sums: of the chunk, in the lanes' tree.
template <typename Keep>
__device__ __forceinline__ void to_weights(const float (&s)[32],
                                           const float (&max)[2],
                                           float (&sums)[2],
                                           Keep keep) {
  const float base[2] = {fold_base(max[0]), fold_base(max[1])};
  float lanes[2][2][2];  // of a row: [row][lane / 8][lane % 2]
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
  return p.tokens * p.heads * segments * kLatentDim;
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

/// The kernel of few tokens; items: tokens times tiles times segments.
void sparse_attn_few(const SparseAttnSm90Params& p, int64_t items, Stream stream);

}  // namespace hadal::ops::cuda
