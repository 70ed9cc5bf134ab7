// Latents of any width, packed or BF16, and any number of heads: a block of four warps folds one
// item (a token's tile of 16 heads, one segment of its list) with mma.sync, whose rounding is
// wgmma's (docs/decisions/0011).
//
// Of a chunk each warp has the scores and weights of 16 keys, and then, for all 64 keys, a quarter
// of the value columns. Packed rows arrive by cp.async as they are and are widened to a tile, which
// frees their place for the next chunk's; BF16 rows arrive in one of two tiles.
#include "ops/attention/sparse_attn_sm90.cuh"
#include "ops/cuda/mma.cuh"

namespace hadal::ops::cuda {
namespace {

constexpr int kHeads = 16, kWarps = 4, kThreads = kWarps * 32;
constexpr int kKeys = static_cast<int>(kAttnChunk);

template <int kWidth, AttnRows kFormat>
struct Memory {
  static constexpr bool kPacked = kFormat == AttnRows::kPacked;
  static constexpr int kRow = static_cast<int>(attn_row_bytes(kWidth, kFormat));
  alignas(128) uint8_t q[kHeads * kWidth * 2];
  alignas(128) uint8_t tile[kPacked ? 1 : 2][kKeys * kWidth * 2];
  alignas(16) uint8_t raw[kPacked ? kKeys * kRow : 16];  ///< packed rows of the next chunk
  alignas(16) float weights[kWarps][2][32][4];           ///< by warp and lane, as its accumulators
  float largest[kWarps][kHeads];                         ///< of a warp's keys
  alignas(16) int32_t number[2][kKeys];                  ///< rows of a chunk; negative: none
};
extern __shared__ __align__(128) uint8_t any_memory[];

/// Byte offset of a 16-byte piece of a row of kWidth BF16 values.
template <int kWidth>
__device__ __forceinline__ uint32_t piece_offset(int row, int piece) {
  return static_cast<uint32_t>(row * (kWidth * 2) + ((piece ^ (row & 7)) << 4));
}

/// One block's work.
template <int kWidth, AttnRows kFormat>
class Item {
 public:
  __device__ __forceinline__ Item(const SparseAttnSm90Params& params, int segments)
      : p(params),
        m(*reinterpret_cast<Memory<kWidth, kFormat>*>(any_memory)),
        tile_count(static_cast<int>((params.heads + kHeads - 1) / kHeads)),
        at{static_cast<int>(blockIdx.x % static_cast<unsigned>(segments)), segments,
           static_cast<int>(blockIdx.x / static_cast<unsigned>(segments)) % tile_count * kHeads, 0},
        token(static_cast<int64_t>(blockIdx.x / static_cast<unsigned>(segments)) / tile_count),
        list(params, token) {
    at.first_row = token * p.heads + at.first_head;
    first = at.segment * static_cast<int>(kAttnSegment);
    const int end = min(list.places, first + static_cast<int>(kAttnSegment));
    chunks = end <= first ? 0 : (end - first + kKeys - 1) / kKeys;
  }

  __device__ __forceinline__ void run() {
    read_numbers(0);
    keep_numbers(0);
    read_numbers(1);
    load_queries();
    __syncthreads();
    if (chunks > 0) copy(0);
    for (int c = 0; c < chunks; ++c) {
      copy_async_wait_all();
      keep_numbers(c + 1);
      __syncthreads();  // and all values of the chunk before are added
      if constexpr (kPacked) {
        widen();
        __syncthreads();
      }
      if (c + 1 < chunks) copy(c + 1);
      read_numbers(c + 2);
      fold(c);
    }
    write();
  }

 private:
  using Shared = Memory<kWidth, kFormat>;
  static constexpr bool kPacked = Shared::kPacked;
  static constexpr int kRow = Shared::kRow, kPieces = kWidth / 8;
  static constexpr int kColumns = kWidth / kWarps;  ///< of values, each warp's

  __device__ __forceinline__ uint32_t tile(int c) const {
    return smem_address(m.tile[kPacked ? 0 : c & 1]);
  }

  /// Numbers of the rows of chunk c, on their way while the chunks before are folded.
  __device__ __forceinline__ void read_numbers(int c) {
    if (thread >= kKeys) return;
    number = c < chunks ? list.chunk(p, first + c * kKeys).number(thread) : -1;
  }
  __device__ __forceinline__ void keep_numbers(int c) {
    if (thread < kKeys) m.number[c & 1][thread] = number;
  }

  /// Rows of chunk c, which lie in its tile or, packed, in m.raw once all copies have ended.
  __device__ __forceinline__ void copy(int c) {
    constexpr int kPiece = kPacked ? 8 : 16, kOfRow = kRow / kPiece;
    const uint8_t* rows = list.chunk(p, first + c * kKeys).rows;
    const uint32_t to = kPacked ? smem_address(m.raw) : tile(c);
#pragma unroll 4
    for (int i = thread; i < kKeys * kOfRow; i += kThreads) {
      const int row = i / kOfRow, piece = i % kOfRow;
      const int32_t from = m.number[c & 1][row];
      const uint8_t* src = from < 0 ? reinterpret_cast<const uint8_t*>(p.q)
                                    : rows + static_cast<int64_t>(from) * kRow + piece * kPiece;
      const int bytes = from < 0 ? 0 : kPiece;  // the rest becomes zero
      if constexpr (kPacked) {
        asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to + i * 8), "l"(src),
                     "r"(bytes)
                     : "memory");
      } else {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                         to + piece_offset<kWidth>(row, piece)),
                     "l"(src), "r"(bytes)
                     : "memory");
      }
    }
  }

  /// The packed rows as BF16; a row of zero bytes gives zeros.
  __device__ __forceinline__ void widen() {
    constexpr int kRounded = kWidth - static_cast<int>(kAttnRotary), kCodes = kRounded / 8;
    constexpr int kScales = kRounded + 2 * static_cast<int>(kAttnRotary);
    if constexpr (kCodes > 0) {
#pragma unroll 4
      for (int i = thread; i < kKeys * kCodes; i += kThreads) {
        const int row = i / kCodes, piece = i % kCodes;
        const uint8_t* from = m.raw + row * kRow;
        store16(tile(0) + piece_offset<kWidth>(row, piece),
                widen_any_codes(*reinterpret_cast<const uint2*>(from + piece * 8),
                                from[kScales + piece / 8]));
      }
    }
#pragma unroll
    for (int i = thread; i < kKeys * 8; i += kThreads) {
      const int row = i / 8, piece = i % 8;
      const auto* from = reinterpret_cast<const uint2*>(m.raw + row * kRow + kRounded + piece * 16);
      store16(tile(0) + piece_offset<kWidth>(row, kCodes + piece),
              make_uint4(from[0].x, from[0].y, from[1].x, from[1].y));
    }
  }

  /// Of heads that there are; the rest of the tile is zero.
  __device__ __forceinline__ void load_queries() {
    const uint16_t* q = p.q + at.first_row * kWidth;
    for (int i = thread; i < kHeads * kPieces; i += kThreads) {
      const int row = i / kPieces, piece = i % kPieces;
      const bool any = at.first_head + row < p.heads;
      copy_async(smem_address(m.q) + piece_offset<kWidth>(row, piece),
                 any ? q + row * kWidth + piece * 8 : p.q, any);
    }
  }

  /// Logits of the warp's sixteen keys.
  __device__ __forceinline__ void score(int c, float (&s)[2][4]) const {
    const uint32_t q = smem_address(m.q), rows = tile(c);
    const int row_a = lane & 15, half_a = lane >> 4;
    const int row_b = warp * 16 + (lane & 7) + (lane >> 4 << 3), half_b = lane >> 3 & 1;
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] = 0.0f;
#pragma unroll 8
    for (int step = 0; step < kWidth / 16; ++step) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, q + piece_offset<kWidth>(row_a, step * 2 + half_a));
      ldmatrix_x4(b, rows + piece_offset<kWidth>(row_b, step * 2 + half_b));
      mma_bf16(s[0], a, b[0], b[1]);
      mma_bf16(s[1], a, b[2], b[3]);
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int2 there =
          *reinterpret_cast<const int2*>(&m.number[c & 1][warp * 16 + tile * 8 + lane % 4 * 2]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        s[tile][i] = (i % 2 == 0 ? there.x : there.y) < 0 ? -INFINITY : s[tile][i] * p.scale;
    }
  }

  __device__ __forceinline__ void fold(int c) {
    float s[2][4];
    score(c, s);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float most = quad_largest(fmaxf(fmaxf(s[0][half * 2], s[0][half * 2 + 1]),
                                            fmaxf(s[1][half * 2], s[1][half * 2 + 1])));
      if (lane % 4 == 0) m.largest[warp][lane / 4 + half * 8] = most;
    }
    __syncthreads();
    float factor[2], base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float seen = state.max[half];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) seen = fmaxf(seen, m.largest[w][lane / 4 + half * 8]);
      base[half] = fold_base(seen);
      factor[half] = exp_below(state.max[half] - base[half]);
      state.max[half] = seen;
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float e[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) e[i] = exp_below(s[tile][i] - base[i / 2]);
      *reinterpret_cast<float4*>(m.weights[warp][tile][lane]) = make_float4(e[0], e[1], e[2], e[3]);
    }
    __syncthreads();
    add_chunk(c, factor);
  }

  /// The weights of all keys join the sums, and their values the warp's columns.
  __device__ __forceinline__ void add_chunk(int c, const float (&factor)[2]) {
    uint32_t a[kWarps][4];
    float lanes[2][2][2];  // join_lanes
#pragma unroll
    for (int group = 0; group < kWarps; ++group) {  // of sixteen keys
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const float4 e = *reinterpret_cast<const float4*>(m.weights[group][tile][lane]);
        const auto add = [&](int half, int i, float x) {
          float& sum = lanes[half][tile][i];
          sum = group == 0 ? x : sum + x;
        };
        add(0, 0, e.x), add(0, 1, e.y), add(1, 0, e.z), add(1, 1, e.w);
        a[group][tile * 2] = pack_bf16(e.x, e.y);
        a[group][tile * 2 + 1] = pack_bf16(e.z, e.w);
      }
    }
    float sums[2];
    join_lanes(lanes, sums);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      state.sum[half] = state.sum[half] * factor[half] + sums[half];
    rescale_rows(o, factor);
    const int row = (lane & 7) + ((lane >> 3 & 1) << 3), half = lane >> 4;
#pragma unroll
    for (int group = 0; group < kWarps; ++group) {
#pragma unroll
      for (int pair = 0; pair < kColumns / 16; ++pair) {
        uint32_t b[4];
        ldmatrix_x4_trans(b,
                          tile(c) + piece_offset<kWidth>(group * 16 + row,
                                                         (warp * kColumns + pair * 16) / 8 + half));
        mma_bf16(tile_of(pair * 2), a[group], b[0], b[1]);
        mma_bf16(tile_of(pair * 2 + 1), a[group], b[2], b[3]);
      }
    }
  }
  /// Eight of the warp's columns.
  __device__ __forceinline__ float (&tile_of(int i))[4] {
    return *reinterpret_cast<float(*)[4]>(o + i * 4);
  }

  __device__ __forceinline__ void write() const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = at.first_head + lane / 4 + half * 8;
      if (head >= p.heads) continue;
      const int64_t row = token * p.heads + head;
      const int column = warp * kColumns + lane % 4 * 2;
      const bool first_lane = warp == 0 && lane % 4 == 0;
      if (at.segments > 1) {
        const int64_t slot = row * at.segments + at.segment;
        float* to = p.scratch + slot * kWidth + column;
#pragma unroll
        for (int i = 0; i < kColumns / 2; i += 4)
          *reinterpret_cast<float2*>(to + i * 2) =
              make_float2(o[i + half * 2], o[i + half * 2 + 1]);
        if (first_lane)
          *reinterpret_cast<float2*>(p.scratch + scratch_stats(p, at.segments) + slot * 2) =
              make_float2(state.max[half], state.sum[half]);
        continue;
      }
      const bool any = state.max[half] != -INFINITY;
      const float denominator =
          any ? state.sum[half] + exp_exact(__ldg(p.sink + head) - state.max[half]) : 0.0f;
      const float factor = any ? 1.0f / denominator : 0.0f;
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 4)
        *reinterpret_cast<uint32_t*>(p.out + row * kWidth + column + i * 2) =
            pack_bf16(o[i + half * 2] * factor, o[i + half * 2 + 1] * factor);
      if (first_lane && p.stats != nullptr) {
        p.stats[row * 2] = state.max[half];
        p.stats[row * 2 + 1] = denominator;
      }
    }
  }

  const SparseAttnSm90Params& p;
  Shared& m;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  int tile_count;
  AttnResult at;
  int64_t token;
  AttnList list;
  int first, chunks;    ///< the segment's first place, and its chunks
  int32_t number = -1;  ///< of the chunk whose numbers were read last
  AttnState state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
  float o[kColumns / 2] = {};  ///< of columns 8 j + 2 (lane % 4), as the instruction has them
};

template <int kWidth, AttnRows kFormat>
__global__ void __launch_bounds__(kThreads)
    sparse_attn_any_kernel(const __grid_constant__ SparseAttnSm90Params p, int segments) {
  wait_for_previous();
  launch_dependents();
  Item<kWidth, kFormat>(p, segments).run();
}

template <int kWidth, AttnRows kFormat>
void launch(const SparseAttnSm90Params& p, Stream stream) {
  constexpr int kBytes = sizeof(Memory<kWidth, kFormat>);
  static_assert(kBytes <= 227 * 1024);
  const int64_t segments = sparse_attn_segments(p), tiles = (p.heads + kHeads - 1) / kHeads;
  const auto kernel = sparse_attn_any_kernel<kWidth, kFormat>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  launch_early(kernel, {blocks_for(p.tokens * tiles * segments, 1), kThreads, kBytes}, stream,
               "sparse_attn_sm90", p, static_cast<int>(segments));
}

template <AttnRows kFormat>
void launch_width(const SparseAttnSm90Params& p, Stream stream) {
  switch (p.width / 64) {
    case 1:
      return launch<64, kFormat>(p, stream);
    case 2:
      return launch<128, kFormat>(p, stream);
    case 3:
      return launch<192, kFormat>(p, stream);
    case 4:
      return launch<256, kFormat>(p, stream);
    case 5:
      return launch<320, kFormat>(p, stream);
    case 6:
      return launch<384, kFormat>(p, stream);
    case 7:
      return launch<448, kFormat>(p, stream);
    default:
      return launch<512, kFormat>(p, stream);
  }
}

}  // namespace

void sparse_attn_any(const SparseAttnSm90Params& p, Stream stream) {
  if (p.format == AttnRows::kPacked) {
    launch_width<AttnRows::kPacked>(p, stream);
  } else {
    launch_width<AttnRows::kBf16>(p, stream);
  }
}

}  // namespace hadal::ops::cuda
