// Lists of latents and chunks of them on their way to operands, for the kernels of
// sparse_attn_sm90.h. Device code for sm_90a only.
//
// Tiles. 64 rows of 512 BF16 values lie as 8 slabs of 64 channels, each 64 rows of 128 bytes whose
// 16-byte pieces are swizzled (sm90_layout.h): operand_descriptor reads rows as keys of the scores,
// transposed_descriptor the same bytes as values.
#pragma once

#include "ops/attention/sparse_attn_sm90.h"
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

/// A chunk of BF16 rows, copied to a tile as they are by 256 threads: thread t has piece t % 8 of
/// every slab of two rows, as LatentChunk has them.
class WideChunk {
 public:
  __device__ __forceinline__ explicit WideChunk(int thread) : t(thread) {}

  __device__ __forceinline__ int row(int u) const { return t / 32 * 8 + t % 32 / 8 + u * 4; }
  /// Numbers of the thread's rows.
  __device__ __forceinline__ void find(const AttnSource& source, int32_t (&number)[2]) const {
#pragma unroll
    for (int u = 0; u < 2; ++u) number[u] = source.number(row(u));
  }
  /// Into a free tile; `full` knows when all is there. Rows without a number become zero.
  __device__ __forceinline__ void copy(const SparseAttnSm90Params& p,
                                       const uint16_t* rows,
                                       const int32_t (&number)[2],
                                       uint32_t tile,
                                       uint64_t* present,
                                       uint64_t* full) const {
    uint32_t bits = 0;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const bool any = number[u] >= 0;
      const uint32_t votes = __ballot_sync(0xffffffffu, any);
      bits |= ((votes & 1) | (votes >> 7 & 2) | (votes >> 14 & 4) | (votes >> 21 & 8)) << (u * 4);
      const uint16_t* from =
          (any ? rows + static_cast<int64_t>(number[u]) * kLatentDim : p.q) + t % 8 * 8;
      const uint32_t to = tile + slab_offset(row(u), t % 8);
#pragma unroll
      for (int slab = 0; slab < 8; ++slab) {
        asm volatile(
            "cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to + slab * kSlabTile),
            "l"(from + slab * 64), "r"(any ? 16 : 0)
            : "memory");
      }
    }
    arrive_when_copied(full);
    if (t % 32 != 0) return;
    reinterpret_cast<uint8_t*>(present)[t / 32] = static_cast<uint8_t>(bits);
    barrier_arrive(full);
  }
  /// An arrival once this thread's copies have ended.
  static __device__ __forceinline__ void arrive_when_copied(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(smem_address(barrier))
                 : "memory");
  }

 private:
  int t;
};

}  // namespace hadal::ops::cuda
