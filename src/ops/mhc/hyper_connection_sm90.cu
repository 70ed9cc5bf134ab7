// hc_pre: a cluster of blocks takes some tokens; each block has some rows of fn, which the copy
// engine brings in pieces beside the streams. Groups of sixteen threads add products in the order
// of the CPU's vectors: few tokens share the groups with the rows, many have one for themselves.
// The blocks exchange the 24 logits of each token, compute its gates alike, and mix a part of its
// channels each.
#include "ops/cuda/elementwise.cuh"
#include "ops/cuda/row_piece.cuh"
#include "ops/cuda/rows.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/mhc/hyper_connection_sm90.h"
#include "ops/mhc/sinkhorn.cuh"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 256, kGroups = kThreads / 16;

/// kRows: rows of fn of a block. kSpread: a group has one row (or the squares) of a token, four
/// groups a token; else a group has all rows of kEach tokens. kPieceValues: values of a row in a
/// stage.
template <int kRows, bool kSpread, int kEach, int kPieceValues>
struct Shape {
  static constexpr int rows = kRows, each = kEach, piece = kPieceValues;
  static constexpr bool spread = kSpread;
  static constexpr int stages = kSpread ? 8 : 4;
  static constexpr int tokens = kSpread ? kGroups / 4 : kGroups * kEach;
  /// Rows are apart by half the banks, so that two groups of a warp do not meet.
  static constexpr int fn_stride = piece * 4 + 64;
  static constexpr int fn_bytes = kRows * fn_stride, stream_bytes = tokens * piece * 2;
  static constexpr int stage_bytes = (fn_bytes + stream_bytes + 127) / 128 * 128;
};

template <typename S>
struct Memory {
  alignas(128) uint8_t stages[S::stages][S::stage_bytes];
  uint64_t full[S::stages], empty[S::stages];
  float sums[S::tokens][4];  ///< of each row of this block; [3]: of the squares
  float pre[S::tokens][kStreams];
};

/// A warp: each lane asks for some of the rows of a stage.
template <typename S>
__device__ void produce(
    const HcPreSm90Params& p, Memory<S>& m, int64_t first, int tokens, uint32_t rank) {
  const int64_t width = kStreams * p.dim;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const auto* streams = static_cast<const __nv_bfloat16*>(p.streams) + first * width;
  const float* fn = p.fn + rank * S::rows * width;
  const auto pieces = static_cast<int>(width / S::piece);
  const auto bytes = static_cast<uint32_t>(S::rows * S::piece * 4 + tokens * S::piece * 2);
  const auto load_fn = [&](int piece) {
    const int stage = piece % S::stages;
    if (lane == 0) barrier_arrive_expect(&m.full[stage], bytes);
    __syncwarp();
    if (lane < S::rows) {
      bulk_copy(m.stages[stage] + lane * S::fn_stride, fn + lane * width + piece * S::piece,
                S::piece * 4, &m.full[stage]);
    }
  };
  const auto load_streams = [&](int piece) {
    const int stage = piece % S::stages;
    for (int token = lane; token < tokens; token += 32) {
      bulk_copy(m.stages[stage] + S::fn_bytes + token * S::piece * 2,
                streams + token * width + piece * S::piece, S::piece * 2, &m.full[stage]);
    }
  };
  // fn is there before the kernel before us ends; what it writes may be the streams.
  const int ahead = min(pieces, S::stages);
  for (int piece = 0; piece < ahead; ++piece) load_fn(piece);
  wait_for_previous();
  for (int piece = 0; piece < ahead; ++piece) load_streams(piece);
  for (int piece = ahead; piece < pieces; ++piece) {
    barrier_wait(&m.empty[piece % S::stages], (piece / S::stages & 1) ^ 1);
    load_fn(piece);
    load_streams(piece);
  }
}

/// One row of one token a group.
template <typename S>
__device__ __forceinline__ void add_spread(const HcPreSm90Params& p, Memory<S>& m, int tokens) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 16, row = t / 16 % 4, token = t / 64;
  const bool squares = row >= S::rows;
  constexpr int kAhead = 16, kRuns = S::piece / (16 * kAhead);
  float sum = 0.0f;
  const auto pieces = static_cast<int>(kStreams * p.dim / S::piece);
  for (int piece = 0; piece < pieces; ++piece) {
    const int stage = piece % S::stages;
    barrier_wait(&m.full[stage], piece / S::stages & 1);
    const uint8_t* at = m.stages[stage];
    const auto* w = reinterpret_cast<const float*>(at + (squares ? 0 : row) * S::fn_stride) + lane;
    const auto* x =
        reinterpret_cast<const __nv_bfloat16*>(at + S::fn_bytes) + token * S::piece + lane;
    // Groups without a token leave the shared memory to the others.
    if (token < tokens) {
      // Loads of the next run first, so that the additions, which depend on each other, wait for
      // none of them.
      float value[2][kAhead], weight[2][kAhead];
      const auto load = [&](int run) {
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          value[run % 2][k] = to_float(x[(run * kAhead + k) * 16]);
          weight[run % 2][k] = w[(run * kAhead + k) * 16];
        }
      };
      load(0);
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        if (run + 1 < kRuns) load(run + 1);
#pragma unroll
        for (int k = 0; k < kAhead; ++k) {
          const float v = value[run % 2][k];
          sum = fmaf(v, squares ? v : weight[run % 2][k], sum);
        }
      }
    }
    barrier_arrive(&m.empty[stage]);
  }
  sum = sum_of_lanes(sum);
  if (lane == 0) m.sums[token][squares ? 3 : row] = sum;
}

/// All rows of some tokens a group.
template <typename S>
__device__ __forceinline__ void add_together(const HcPreSm90Params& p, Memory<S>& m, int tokens) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 16, first = t / 16 * S::each;
  float sum[S::each][S::rows + 1] = {};
  const auto pieces = static_cast<int>(kStreams * p.dim / S::piece);
  for (int piece = 0; piece < pieces; ++piece) {
    const int stage = piece % S::stages;
    barrier_wait(&m.full[stage], piece / S::stages & 1);
    const uint8_t* at = m.stages[stage];
    const auto* w = reinterpret_cast<const float*>(at);
    const auto* x = reinterpret_cast<const __nv_bfloat16*>(at + S::fn_bytes) + first * S::piece;
#pragma unroll 4
    for (int i = lane; i < S::piece && first < tokens; i += 16) {
      float weights[S::rows];
#pragma unroll
      for (int row = 0; row < S::rows; ++row) weights[row] = w[row * (S::fn_stride / 4) + i];
#pragma unroll
      for (int j = 0; j < S::each; ++j) {
        const float value = to_float(x[j * S::piece + i]);
#pragma unroll
        for (int row = 0; row < S::rows; ++row)
          sum[j][row] = fmaf(value, weights[row], sum[j][row]);
        sum[j][S::rows] = fmaf(value, value, sum[j][S::rows]);
      }
    }
    barrier_arrive(&m.empty[stage]);
  }
#pragma unroll
  for (int j = 0; j < S::each; ++j) {
#pragma unroll
    for (int row = 0; row <= S::rows; ++row) {
      const float all = sum_of_lanes(sum[j][row]);
      if (lane == 0) m.sums[first + j][row < S::rows ? row : 3] = all;
    }
  }
}

/// The logit of a row of fn of a token, whose sums lie in the block that has the row.
template <typename S>
__device__ __forceinline__ float logit_of(
    const HcPreSm90Params& p, Memory<S>& m, int token, int row, int scale) {
  const auto width = static_cast<float>(kStreams * p.dim);
  const float mean = m.sums[token][3] / width;
  const float rho = 1.0f / sqrtf(mean + p.norm_eps);
  const float z =
      load_remote(&m.sums[token][row % S::rows], static_cast<uint32_t>(row / S::rows)) * rho;
  return z * p.scale[scale] + p.base[row];
}

/// What a token's streams are collapsed with, and what the sub-layer's result is spread with, by
/// sixteen lanes.
template <typename S, bool kHead>
__device__ __forceinline__ void outer_gates(
    const HcPreSm90Params& p, Memory<S>& m, int64_t first, int token, bool exists, uint32_t rank) {
  const int lane = static_cast<int>(threadIdx.x) % 16, stream = lane % kStreams;
  const float pre = sigmoid_exact(logit_of(p, m, token, stream, 0)) + p.hc_eps;
  if (lane < kStreams) m.pre[token][lane] = pre;
  if constexpr (!kHead) {
    const float post = 2.0f * sigmoid_exact(logit_of(p, m, token, kStreams + stream, 1));
    if (rank == 0 && exists && lane < kStreams) p.post[(first + token) * kStreams + lane] = post;
  }
}

/// The matrix that carries streams past the sub-layer, by sixteen lanes a token: a chain of
/// divisions that nothing before the sub-layer's end waits for, so a warp of its own has it.
template <typename S, int kBlocks>
__device__ __forceinline__ void inner_gates(
    const HcPreSm90Params& p, Memory<S>& m, int64_t first, int tokens, uint32_t rank) {
  const int t = static_cast<int>(threadIdx.x) % 32, lane = t % 16;
  // Tokens are dealt out to the blocks, two to a warp; all lanes of a warp take part.
  for (int pair = static_cast<int>(rank) * 2; pair < tokens; pair += kBlocks * 2) {
    const int token = pair + t / 16, of = min(token, S::tokens - 1);
    const float comb =
        sinkhorn(logit_of(p, m, of, 2 * kStreams + lane, 2), lane, p.sinkhorn_iters, p.hc_eps);
    if (token < tokens) p.comb[(first + token) * kCells + lane] = comb;
  }
}

template <typename S, bool kHead, int kBlocks>
__global__ void __launch_bounds__(kThreads + 32)
    hc_pre_kernel(const __grid_constant__ HcPreSm90Params p) {
  extern __shared__ __align__(128) uint8_t raw[];
  auto& m = *reinterpret_cast<Memory<S>*>(raw);
  const int t = static_cast<int>(threadIdx.x);
  const uint32_t rank = cluster_rank();
  const int64_t first = blockIdx.x / kBlocks * S::tokens;
  const auto tokens = static_cast<int>(min(p.tokens - first, int64_t{S::tokens}));
  if (t == 0) {
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(&m.full[i], 1);
      barrier_init(&m.empty[i], kThreads);
    }
    barrier_init_done();
  }
  __syncthreads();
  launch_dependents();
  if (t >= kThreads) {
    produce<S>(p, m, first, tokens, rank);
  } else {
    if constexpr (S::spread) {
      add_spread<S>(p, m, tokens);
    } else {
      add_together<S>(p, m, tokens);
    }
  }
  wait_for_previous();
  cluster_sync();
  if (t >= kThreads) {
    if constexpr (!kHead) inner_gates<S, kBlocks>(p, m, first, tokens, rank);
    cluster_sync();  // nobody leaves while its sums are read
    return;
  }
  for (int token = t / 16; token < (S::tokens + 15) / 16 * 16; token += kThreads / 16) {
    // All lanes of a warp take part; what does not exist is not written.
    outer_gates<S, kHead>(p, m, first, min(token, S::tokens - 1), token < tokens, rank);
  }
  asm volatile("bar.sync 1, %0;" ::"n"(kThreads) : "memory");  // `pre` is there
  const auto part = static_cast<int>(p.dim / kBlocks), begin = static_cast<int>(rank) * part;
  const auto* streams = static_cast<const __nv_bfloat16*>(p.streams) + first * kStreams * p.dim;
  auto* mixed = static_cast<__nv_bfloat16*>(p.mixed) + first * p.dim;
  for (int i = t * 4; i < tokens * part; i += kThreads * 4) {
    const int token = i / part;
    const int64_t channel = begin + i % part;
    const __nv_bfloat16* at = streams + token * kStreams * p.dim + channel;
    const float4 x = load4(at);
    const float first_gate = m.pre[token][0];
    float4 sum =
        make_float4(first_gate * x.x, first_gate * x.y, first_gate * x.z, first_gate * x.w);
#pragma unroll
    for (int j = 1; j < kStreams; ++j) {
      const float gate = m.pre[token][j];
      sum = axpy4(gate, load4(at + j * p.dim), sum);
    }
    store4(mixed + token * p.dim + channel, sum);
  }
  cluster_sync();
}

template <bool kHead, bool kSpread, int kEach, int kPieceValues>
void launch(const HcPreSm90Params& p, Stream stream) {
  // 24 rows of fn in 8 blocks, or the head's 4 in 4.
  using S = Shape<kHead ? 1 : 3, kSpread, kEach, kPieceValues>;
  constexpr int kBlocks = kHead ? 4 : 8;
  auto* kernel = hc_pre_kernel<S, kHead, kBlocks>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Memory<S>));
  const unsigned blocks = blocks_for((p.tokens + S::tokens - 1) / S::tokens * kBlocks, 1);
  launch_early(kernel, {blocks, kThreads + 32, sizeof(Memory<S>), kBlocks}, stream, "hc_pre_sm90",
               p);
}

template <bool kHead>
void launch_by_size(const HcPreSm90Params& p, Stream stream) {
  // A piece is a part of the concatenated streams.
  if (p.tokens <= 4 && p.dim % 256 == 0) return launch<kHead, true, 1, 1024>(p, stream);
  if (p.tokens <= 4) return launch<kHead, true, 1, 512>(p, stream);
  if (p.tokens <= 256) return launch<kHead, false, 1, 512>(p, stream);
  launch<kHead, false, 2, 512>(p, stream);
}

/// new[k] = post[k] * out + sum_j comb[j, k] * streams[j], four channels a thread.
__global__ void hc_post_kernel(const __grid_constant__ HcPostSm90Params p) {
  wait_for_previous();
  launch_dependents();
  const auto [token, piece] = row_piece((p.dim + 511) / 512);
  const int64_t i = piece * int64_t{512} + threadIdx.x * 4;
  if (i >= p.dim) return;
  const auto* streams = static_cast<const __nv_bfloat16*>(p.streams) + token * kStreams * p.dim + i;
  auto* result = static_cast<__nv_bfloat16*>(p.result) + token * kStreams * p.dim + i;
  const float4 f = load4(static_cast<const __nv_bfloat16*>(p.out) + token * p.dim + i);
  const float *post = p.post + token * kStreams, *comb = p.comb + token * kCells;
  float4 old[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) old[j] = load4(streams + j * p.dim);
#pragma unroll
  for (int k = 0; k < kStreams; ++k) {
    const float c = comb[k];
    float4 carried = make_float4(c * old[0].x, c * old[0].y, c * old[0].z, c * old[0].w);
#pragma unroll
    for (int j = 1; j < kStreams; ++j) carried = axpy4(comb[j * kStreams + k], old[j], carried);
    store4(result + k * p.dim, axpy4(post[k], f, carried));
  }
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void hc_pre_sm90(const HcPreSm90Params& p, Stream stream) {
  if (p.tokens == 0) return;
  if (p.dim % 128 != 0) throw_kernel_error("hc_pre_sm90", "dim is not a multiple of 128");
  p.head ? cuda::launch_by_size<true>(p, stream) : cuda::launch_by_size<false>(p, stream);
}

void hc_post_sm90(const HcPostSm90Params& p, Stream stream) {
  if (p.tokens == 0) return;
  const unsigned grid = cuda::blocks_for(p.tokens * ((p.dim + 511) / 512), 1);
  cuda::launch_early(cuda::hc_post_kernel, {grid, 128}, stream, "hc_post_sm90", p);
}

}  // namespace hadal::ops
