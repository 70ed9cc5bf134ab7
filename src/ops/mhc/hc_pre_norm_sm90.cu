// A cluster of eight blocks takes one token, or four of many. Each block has three rows of fn,
// which the copy engine brings while the kernel before still runs, and all streams of the tokens.
// Groups of sixteen threads add products in the order of the CPU's vectors; the blocks tell each
// other their sums, and then each mixes and adds all channels alike, which is quicker than to
// exchange them, and writes its share. A ninth warp copies.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/rows.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/gemm/operand_rows.cuh"
#include "ops/mhc/hyper_connection_sm90.h"
#include "ops/mhc/sinkhorn.cuh"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kBlocks = 8, kRows = 3;
constexpr int kRowsOfFn = kBlocks * kRows;
constexpr int kPiece = 1024;  ///< values of a row in a stage
constexpr int kRun = 16, kRunsOfPiece = kPiece / (16 * kRun);
/// Rows are apart by half the banks, so that two groups of a warp do not meet.
constexpr int kRowBytes = kPiece * 4 + 64, kStageBytes = (kRows * kRowBytes + 127) / 128 * 128;

template <int kTokens>
struct Memory {
  static constexpr int stages = kTokens == 1 ? 8 : 4;
  alignas(128) uint8_t fn[stages][kStageBytes];
  uint64_t full[stages], empty[stages], streams[kStreams];
  float sums[kTokens][kRowsOfFn];  ///< products of all rows of fn with the tokens' streams
  float squares[kTokens], rstd[kTokens];
};

/// Streams and the mixed rows, BF16, lie behind the memory.
template <int kTokens>
size_t shared_bytes(int64_t dim) {
  return sizeof(Memory<kTokens>) + static_cast<size_t>(dim) * kTokens * (kStreams + 1) * 2;
}

/// Brings fn piece by piece, and the streams once they are there; by one warp.
template <int kTokens>
__device__ __forceinline__ void produce(const HcPreSm90Params& p,
                                        Memory<kTokens>& m,
                                        __nv_bfloat16* streams,
                                        int64_t first,
                                        int tokens,
                                        uint32_t rank) {
  constexpr int kStages = Memory<kTokens>::stages;
  const int64_t width = kStreams * p.dim;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float* fn = p.fn + rank * kRows * width;
  const auto pieces = static_cast<int>(width / kPiece);
  const auto load = [&](int piece) {
    const int stage = piece % kStages;
    if (lane == 0) barrier_arrive_expect(&m.full[stage], kRows * kPiece * 4);
    __syncwarp();
    if (lane < kRows) {
      bulk_copy(m.fn[stage] + lane * kRowBytes, fn + lane * width + piece * kPiece, kPiece * 4,
                &m.full[stage]);
    }
  };
  const int ahead = min(pieces, kStages);
  for (int piece = 0; piece < ahead; ++piece) load(piece);
  wait_for_previous();
  if (lane < kStreams) {
    const auto bytes = static_cast<uint32_t>(p.dim * 2);
    barrier_arrive_expect(&m.streams[lane], bytes * static_cast<uint32_t>(tokens));
    for (int token = 0; token < tokens; ++token)
      bulk_copy(
          streams + token * width + lane * p.dim,
          static_cast<const __nv_bfloat16*>(p.streams) + (first + token) * width + lane * p.dim,
          bytes, &m.streams[lane]);
  }
  for (int piece = ahead; piece < pieces; ++piece) {
    barrier_wait(&m.empty[piece % kStages], (piece / kStages & 1) ^ 1);
    load(piece);
  }
}

/// A row of fn, or the squares, times the streams of a token: four groups a token.
template <int kTokens>
__device__ __forceinline__ void add_products(const HcPreSm90Params& p,
                                             Memory<kTokens>& m,
                                             const __nv_bfloat16* streams,
                                             uint32_t rank) {
  constexpr int kStages = Memory<kTokens>::stages;
  const int t = static_cast<int>(threadIdx.x), lane = t % 16, row = t / 16 % 4, token = t / 64;
  const bool squares = row == kRows;
  const auto pieces = static_cast<int>(kStreams * p.dim / kPiece),
             runs_of_stream = static_cast<int>(p.dim / (16 * kRun));
  // The group beside the squares' has the banks of row 0.
  const uint8_t* const fn = m.fn[0] + (squares ? 1 : row) * kRowBytes + lane * 4;
  const __nv_bfloat16* x = streams + token * kStreams * p.dim + lane;
  int stream = 0, left = 0;  // runs of this stream that are left
  // Loads of the next run first, so that the additions, which depend on each other, wait for none
  // of them.
  float value[2][kRun], weight[2][kRun];
  const auto load = [&](const uint8_t* stage, int run) {
    if (left == 0) {
      barrier_wait(&m.streams[stream++], 0);
      left = runs_of_stream;
    }
    --left;
    const auto* w = reinterpret_cast<const float*>(stage) + run * 16 * kRun;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      value[run % 2][k] = to_float(x[k * 16]);
      weight[run % 2][k] = w[k * 16];
    }
    x += 16 * kRun;
  };
  float sum = 0.0f;
  barrier_wait(&m.full[0], 0);
  load(fn, 0);
  int stage = 0;
  uint32_t phase = 0;
  for (int piece = 0; piece < pieces; ++piece) {
    const int next = stage + 1 == kStages ? 0 : stage + 1;
    if (next == 0) phase ^= 1;
#pragma unroll
    for (int run = 0; run < kRunsOfPiece; ++run) {
      if (run + 1 < kRunsOfPiece) {
        load(fn + stage * kStageBytes, run + 1);
      } else if (piece + 1 < pieces) {
        barrier_wait(&m.full[next], phase);
        load(fn + next * kStageBytes, 0);
      }
#pragma unroll
      for (int k = 0; k < kRun; ++k) {
        const float v = value[run % 2][k];
        sum = fmaf(v, squares ? v : weight[run % 2][k], sum);
      }
    }
    barrier_arrive(&m.empty[stage]);
    stage = next;
  }
  sum = sum_of_lanes(sum);
  if (squares) {
    if (lane == 0) m.squares[token] = sum;
  } else if (lane < kBlocks) {
    const float* place = &m.sums[token][rank * kRows + static_cast<uint32_t>(row)];
    store_remote(remote_address(place, static_cast<uint32_t>(lane)), sum);
  }
}

/// base and scale of a row of fn, read while nobody waits for them.
struct Affine {
  float scale, base;
  __device__ Affine(const HcPreSm90Params& p, int row)
      : scale(p.scale[row < kStreams       ? 0
                      : row < 2 * kStreams ? 1
                                           : 2]),
        base(p.base[row]) {}
  __device__ float logit(const HcPreSm90Params& p, float sum, float squares) const {
    const float mean = squares / static_cast<float>(kStreams * p.dim);
    const float rho = 1.0f / sqrtf(mean + p.norm_eps);
    const float z = sum * rho;
    return z * scale + base;
  }
};

/// The streams' weighted sum, by threads `t` of `threads`.
__device__ __forceinline__ void mix(const float (&gate)[kStreams],
                                    const __nv_bfloat16* streams,
                                    __nv_bfloat16* mixed,
                                    int dim,
                                    int t,
                                    int threads) {
  for (int i = t * 4; i < dim; i += threads * 4) {
    const float4 x = load4(streams + i);
    float4 sum = make_float4(gate[0] * x.x, gate[0] * x.y, gate[0] * x.z, gate[0] * x.w);
#pragma unroll
    for (int j = 1; j < kStreams; ++j) sum = axpy4(gate[j], load4(streams + j * dim + i), sum);
    store4(mixed + i, sum);
  }
}

/// 1 / RMS of a mixed row, by sixteen lanes.
__device__ __forceinline__ float reciprocal_rms(const __nv_bfloat16* mixed, int dim, float eps) {
  float squares = 0.0f;
#pragma unroll 32
  for (int i = static_cast<int>(threadIdx.x) % 16; i < dim; i += 16) {
    const float v = to_float(mixed[i]);
    squares = fmaf(v, v, squares);
  }
  const float mean = sum_of_lanes(squares) / static_cast<float>(dim);
  return 1.0f / sqrtf(mean + eps);
}

__device__ __forceinline__ void store_operands(const NormalisedSm90Params& p,
                                               int64_t token,
                                               int channel,
                                               float4 v) {
  if (p.codes != nullptr) store_quantised(v, token, channel / 128, p.codes, p.scales, p.x_groups);
  if (p.operand != nullptr) store_low(v, token, channel, p.operand, p.x_groups);
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads + 32)
    hc_pre_norm_kernel(const __grid_constant__ HcPreNormSm90Params all) {
  const HcPreSm90Params& p = all.pre;
  const NormalisedSm90Params& norm = all.norm;
  extern __shared__ __align__(128) uint8_t raw[];
  auto& m = *reinterpret_cast<Memory<kTokens>*>(raw);
  auto* streams = reinterpret_cast<__nv_bfloat16*>(raw + sizeof(Memory<kTokens>));
  const auto dim = static_cast<int>(p.dim);
  auto* mixed = streams + kTokens * kStreams * dim;
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  const uint32_t rank = cluster_rank();
  const int64_t first = blockIdx.x / kBlocks * kTokens;
  const auto tokens = static_cast<int>(max(min(p.tokens - first, int64_t{kTokens}), int64_t{0}));
  // Whose 128 channels a warp writes.
  const int channel = (static_cast<int>(rank) + kBlocks * warp) * 128 + lane * 4;
  const bool writes = warp < kWarps && channel < dim;
  if (tokens == 0) {
    wait_for_previous();
    launch_dependents();
    for (int token = 0; writes && token < kTokens; ++token)
      store_operands(norm, first + token, channel, make_float4(0, 0, 0, 0));
    return;
  }
  if (t == 0) {
    for (int i = 0; i < Memory<kTokens>::stages; ++i) {
      barrier_init(&m.full[i], 1);
      barrier_init(&m.empty[i], 64 * kTokens);
    }
    for (int i = 0; i < kStreams; ++i) barrier_init(&m.streams[i], 1);
    barrier_init_done();
  }
  // Nobody tells others anything before all are there.
  cluster_sync();
  launch_dependents();
  // Weights, which may come from far, before anybody needs them.
  const int row = min(lane, kRowsOfFn - 1);
  const Affine affine(p, row);
  float4 weight = make_float4(0, 0, 0, 0);
  if (writes) weight = load4(norm.weight + channel);
  if (warp == kWarps) {
    produce(p, m, streams, first, tokens, rank);
  } else if (t < 64 * kTokens) {
    // Groups without a token add what nobody reads.
    add_products(p, m, streams, rank);
  }
  wait_for_previous();
  cluster_sync();
  if (warp == kWarps) return;
  // Warps share the tokens.
  constexpr int kWarpsOfToken = kWarps / kTokens;
  const int token = warp / kWarpsOfToken, in_token = t % (kWarpsOfToken * 32);
  const float logit = affine.logit(p, m.sums[token][row], m.squares[token]);
  const float sigmoid = sigmoid_exact(logit), pre = sigmoid + p.hc_eps;
  if (rank == 0 && token < tokens && in_token < kRowsOfFn) {
    if (in_token >= 2 * kStreams)
      p.comb[(first + token) * kCells + in_token - 2 * kStreams] = logit;
    else if (in_token >= kStreams)
      p.post[(first + token) * kStreams + in_token - kStreams] = 2.0f * sigmoid;
  }
  float gate[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) gate[j] = __shfl_sync(0xffffffffu, pre, j);
  // The copy engine wrote the streams; who did not wait for them yet does now.
  for (int j = 0; j < kStreams; ++j) barrier_wait(&m.streams[j], 0);
  mix(gate, streams + token * kStreams * dim, mixed + token * dim, dim, in_token,
      kWarpsOfToken * 32);
  named_barrier_wait(1 + token, kWarpsOfToken * 32);
  if (in_token < 32) {
    const float rstd = reciprocal_rms(mixed + token * dim, dim, norm.eps);
    if (in_token == 0) m.rstd[token] = rstd;
  }
  named_barrier_wait(1 + kTokens, kThreads);
  if (!writes) return;
  for (int i = 0; i < tokens; ++i) {
    const float rstd = m.rstd[i];
    float4 y = load4(mixed + i * dim + channel);
    y = make_float4(y.x * rstd, y.y * rstd, y.z * rstd, y.w * rstd);
    const auto low = [](float v) { return round_to<__nv_bfloat16>(v); };
    y = make_float4(low(weight.x * y.x), low(weight.y * y.y), low(weight.z * y.z),
                    low(weight.w * y.w));
    store4(static_cast<__nv_bfloat16*>(norm.out) + (first + i) * p.dim + channel, y);
    store_operands(norm, first + i, channel, y);
  }
  for (int i = tokens; i < kTokens && first + i < norm.x_groups * 8; ++i)
    store_operands(norm, first + i, channel, make_float4(0, 0, 0, 0));
}

template <int kTokens>
void launch(const HcPreNormSm90Params& p, Stream stream) {
  auto* kernel = hc_pre_norm_kernel<kTokens>;
  const size_t bytes = shared_bytes<kTokens>(p.pre.dim);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  const unsigned blocks = blocks_for(p.norm.x_groups * 8 / kTokens * kBlocks, 1);
  launch_early(kernel, {blocks, kThreads + 32, bytes, kBlocks}, stream, "hc_pre_norm_sm90", p);
}

/// Two tokens a warp, in place.
__global__ void __launch_bounds__(32) hc_comb_kernel(const __grid_constant__ HcCombSm90Params p) {
  wait_for_previous();
  launch_dependents();
  const int lane = static_cast<int>(threadIdx.x) % kCells;
  const int64_t token = blockIdx.x * int64_t{2} + threadIdx.x / kCells,
                of = min(token, p.tokens - 1);  // all lanes of a warp take part
  const float cell = sinkhorn(p.comb[of * kCells + lane], lane, p.iters, p.eps);
  __syncwarp();
  if (token < p.tokens) p.comb[token * kCells + lane] = cell;
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

bool serves_hc_pre_norm_sm90(int64_t tokens, int64_t dim) {
  constexpr size_t kSharedMemory = 227 << 10;
  if (dim % 256 != 0 || dim > 8192) return false;
  return tokens <= 16 || (tokens <= 256 && cuda::shared_bytes<4>(dim) <= kSharedMemory);
}

void hc_pre_norm_sm90(const HcPreNormSm90Params& p, Stream stream) {
  const HcPreSm90Params& pre = p.pre;
  if (pre.tokens == 0) return;
  if (!serves_hc_pre_norm_sm90(pre.tokens, pre.dim) || pre.head || p.norm.dim != pre.dim ||
      p.norm.rows != pre.tokens)
    throw_kernel_error("hc_pre_norm_sm90", "too many tokens, or channels that it does not serve");
  pre.tokens <= 16 ? cuda::launch<1>(p, stream) : cuda::launch<4>(p, stream);
}

void hc_comb_sm90(const HcCombSm90Params& p, Stream stream) {
  if (p.tokens == 0) return;
  cuda::launch_early(cuda::hc_comb_kernel, {cuda::blocks_for(p.tokens, 2), 32}, stream,
                     "hc_comb_sm90", p);
}

}  // namespace hadal::ops
