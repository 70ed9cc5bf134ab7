// A cluster of eight blocks takes a token. Each has three rows of fn, which the copy engine brings
// while the kernel before still runs, and all streams of the token. Groups of sixteen threads add
// products in the order of the CPU's vectors; the blocks tell each other their logits, and then
// each mixes and adds all channels alike, which is quicker than to exchange them, and writes its
// share. A ninth warp copies, and then makes the matrix past the sub-layer meanwhile.
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
constexpr int kPiece = 1024, kStages = 8;  ///< values of a row in a stage
constexpr int kMostDim = 8192;
/// Rows are apart by half the banks, so that two groups of a warp do not meet.
constexpr int kRowBytes = kPiece * 4 + 64, kStageBytes = (kRows * kRowBytes + 127) / 128 * 128;

struct Memory {
  alignas(128) uint8_t fn[kStages][kStageBytes];
  uint64_t full[kStages], empty[kStages], streams[kStreams];
  float sums[kBlocks * kRows];  ///< products of all rows of fn with the token's streams
  float squares, rstd;
  float pre[kStreams];
};

size_t shared_bytes(int64_t dim) {
  return sizeof(Memory) + static_cast<size_t>(dim) * (kStreams * 2 + 4);
}

/// Brings fn piece by piece, and the streams once they are there; by one warp.
__device__ __forceinline__ void produce(
    const HcPreSm90Params& p, Memory& m, __nv_bfloat16* streams, int64_t token, uint32_t rank) {
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
    barrier_arrive_expect(&m.streams[lane], bytes);
    bulk_copy(streams + lane * p.dim,
              static_cast<const __nv_bfloat16*>(p.streams) + token * width + lane * p.dim, bytes,
              &m.streams[lane]);
  }
  for (int piece = ahead; piece < pieces; ++piece) {
    barrier_wait(&m.empty[piece % kStages], (piece / kStages & 1) ^ 1);
    load(piece);
  }
}

/// A row of fn, or the squares, times the streams: one of four groups of two warps.
__device__ __forceinline__ void add_products(const HcPreSm90Params& p,
                                             Memory& m,
                                             const __nv_bfloat16* streams,
                                             uint32_t rank) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 16, row = t / 16;
  const bool squares = row == kRows;
  constexpr int kRun = 16, kRunsOfPiece = kPiece / (16 * kRun);
  const auto runs = static_cast<int>(kStreams * p.dim / (16 * kRun)),
             runs_of_stream = static_cast<int>(p.dim / (16 * kRun));
  // Loads of the next run first, so that the additions, which depend on each other, wait for none
  // of them.
  float value[2][kRun], weight[2][kRun];
  const auto load = [&](int run, float(&v)[kRun], float(&w)[kRun]) {
    const int piece = run / kRunsOfPiece, stage = piece % kStages;
    if (run % kRunsOfPiece == 0) barrier_wait(&m.full[stage], piece / kStages & 1);
    if (run % runs_of_stream == 0) barrier_wait(&m.streams[run / runs_of_stream], 0);
    const auto* x = streams + run * 16 * kRun + lane;
    const auto* f = reinterpret_cast<const float*>(m.fn[stage] + (squares ? 0 : row) * kRowBytes) +
                    run % kRunsOfPiece * 16 * kRun + lane;
#pragma unroll
    for (int k = 0; k < kRun; ++k) {
      v[k] = to_float(x[k * 16]);
      w[k] = f[k * 16];
    }
  };
  float sum = 0.0f;
  const auto add = [&](const float(&v)[kRun], const float(&w)[kRun]) {
#pragma unroll
    for (int k = 0; k < kRun; ++k) sum = fmaf(v[k], squares ? v[k] : w[k], sum);
  };
  load(0, value[0], weight[0]);
  for (int run = 0; run < runs; run += 2) {
    load(run + 1, value[1], weight[1]);
    add(value[0], weight[0]);
    const bool last = (run + 2) % kRunsOfPiece == 0;
    if (run + 2 < runs) load(run + 2, value[0], weight[0]);
    add(value[1], weight[1]);
    if (last) barrier_arrive(&m.empty[(run + 1) / kRunsOfPiece % kStages]);
  }
  sum = sum_of_lanes(sum);
  if (squares) {
    if (lane == 0) m.squares = sum;
  } else if (lane < kBlocks) {
    store_remote(remote_address(&m.sums[rank * kRows + static_cast<uint32_t>(row)],
                                static_cast<uint32_t>(lane)),
                 sum);
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
  __device__ float logit(const HcPreSm90Params& p, const Memory& m, int row) const {
    const float mean = m.squares / static_cast<float>(kStreams * p.dim);
    const float rho = 1.0f / sqrtf(mean + p.norm_eps);
    const float z = m.sums[row] * rho;
    return z * scale + base;
  }
};

/// The streams' sum, weighted, in FP32 of BF16 values.
__device__ __forceinline__ void mix(const HcPreSm90Params& p,
                                    const float (&gate)[kStreams],
                                    const __nv_bfloat16* streams,
                                    float* mixed) {
  const auto dim = static_cast<int>(p.dim);
  for (int i = static_cast<int>(threadIdx.x) * 4; i < dim; i += kThreads * 4) {
    const float4 x = load4(streams + i);
    float4 sum = make_float4(gate[0] * x.x, gate[0] * x.y, gate[0] * x.z, gate[0] * x.w);
#pragma unroll
    for (int j = 1; j < kStreams; ++j) sum = axpy4(gate[j], load4(streams + j * dim + i), sum);
    const auto low = [](float v) { return round_to<__nv_bfloat16>(v); };
    store4(mixed + i, make_float4(low(sum.x), low(sum.y), low(sum.z), low(sum.w)));
  }
}

/// 1 / RMS of the mixed row, by sixteen lanes.
__device__ __forceinline__ float reciprocal_rms(const float* mixed, int dim, float eps) {
  float squares = 0.0f;
#pragma unroll 32
  for (int i = static_cast<int>(threadIdx.x) % 16; i < dim; i += 16)
    squares = fmaf(mixed[i], mixed[i], squares);
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

__global__ void __launch_bounds__(kThreads + 32)
    hc_pre_norm_kernel(const __grid_constant__ HcPreNormSm90Params all) {
  const HcPreSm90Params& p = all.pre;
  const NormalisedSm90Params& norm = all.norm;
  extern __shared__ __align__(128) uint8_t raw[];
  auto& m = *reinterpret_cast<Memory*>(raw);
  auto* streams = reinterpret_cast<__nv_bfloat16*>(raw + sizeof(Memory));
  const auto dim = static_cast<int>(p.dim);
  auto* mixed = reinterpret_cast<float*>(streams + kStreams * dim);
  const int t = static_cast<int>(threadIdx.x), warp = t / 32, lane = t % 32;
  const uint32_t rank = cluster_rank();
  const int64_t token = blockIdx.x / kBlocks;
  // Whose 128 channels a warp writes.
  const int channel = (static_cast<int>(rank) + kBlocks * warp) * 128 + lane * 4;
  const bool writes = warp < kWarps && channel < dim;
  if (token >= p.tokens) {
    wait_for_previous();
    launch_dependents();
    if (writes) store_operands(norm, token, channel, make_float4(0, 0, 0, 0));
    return;
  }
  if (t == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(&m.full[i], 1);
      barrier_init(&m.empty[i], 64);
    }
    for (int i = 0; i < kStreams; ++i) barrier_init(&m.streams[i], 1);
    barrier_init_done();
  }
  // Weights, which may come from far, before anybody needs them.
  const int row = warp < kWarps ? lane % (2 * kStreams) : 2 * kStreams + lane % kCells;
  const Affine affine(p, row);
  float4 weight = make_float4(0, 0, 0, 0);
  if (writes) weight = load4(norm.weight + channel);
  // Nobody tells others anything before all are there.
  cluster_sync();
  launch_dependents();
  if (warp == kWarps) {
    produce(p, m, streams, token, rank);
  } else if (t < 64) {
    add_products(p, m, streams, rank);
  }
  wait_for_previous();
  cluster_sync();
  const float logit = affine.logit(p, m, row);
  if (warp == kWarps) {
    if (rank == 0) {
      const float comb = sinkhorn(logit, lane % kCells, p.sinkhorn_iters, p.hc_eps);
      if (lane < kCells) p.comb[token * kCells + lane] = comb;
    }
    return;
  }
  const float sigmoid = sigmoid_exact(logit), pre = sigmoid + p.hc_eps;
  if (rank == 0 && t >= kStreams && t < 2 * kStreams)
    p.post[token * kStreams + t - kStreams] = 2.0f * sigmoid;
  float gate[kStreams];
#pragma unroll
  for (int j = 0; j < kStreams; ++j) gate[j] = __shfl_sync(0xffffffffu, pre, j);
  // The copy engine wrote the streams; who did not wait for them yet does now.
  for (int j = 0; j < kStreams; ++j) barrier_wait(&m.streams[j], 0);
  mix(p, gate, streams, mixed);
  named_barrier_wait(1, kThreads);
  if (warp == 0) {
    const float rstd = reciprocal_rms(mixed, dim, norm.eps);
    if (t == 0) m.rstd = rstd;
  }
  named_barrier_wait(1, kThreads);
  if (!writes) return;
  const float rstd = m.rstd;
  float4 y = load4(mixed + channel);
  y = make_float4(y.x * rstd, y.y * rstd, y.z * rstd, y.w * rstd);
  const auto low = [](float v) { return round_to<__nv_bfloat16>(v); };
  y = make_float4(low(weight.x * y.x), low(weight.y * y.y), low(weight.z * y.z),
                  low(weight.w * y.w));
  store4(static_cast<__nv_bfloat16*>(norm.out) + token * p.dim + channel, y);
  store_operands(norm, token, channel, y);
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void hc_pre_norm_sm90(const HcPreNormSm90Params& p, Stream stream) {
  const HcPreSm90Params& pre = p.pre;
  if (pre.tokens == 0) return;
  if (pre.dim % 256 != 0 || pre.dim > cuda::kMostDim || pre.head || p.norm.dim != pre.dim ||
      p.norm.rows != pre.tokens)
    throw_kernel_error("hc_pre_norm_sm90", "tokens of a multiple of 256 channels, 8,192 at most");
  auto* kernel = cuda::hc_pre_norm_kernel;
  const size_t bytes = cuda::shared_bytes(pre.dim);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(cuda::shared_bytes(cuda::kMostDim)));
  const unsigned blocks = cuda::blocks_for(p.norm.x_groups * 8 * cuda::kBlocks, 1);
  cuda::launch_early(kernel, {blocks, cuda::kThreads + 32, bytes, cuda::kBlocks}, stream,
                     "hc_pre_norm_sm90", p);
}

}  // namespace hadal::ops
