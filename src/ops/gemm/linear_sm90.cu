// E4M3 and BF16 products with both operands in shared memory.
//
// A block computes kTilesM * 64 rows of operand A times kN rows of operand B. One warp feeds a ring
// of stages (a slab of 128 bytes of K of both operands, moved as they lie in memory); each
// warpgroup multiplies its 64 rows of A. Which operand is A does not change a bit: few rows of x
// are B (every byte of the weights is read once, but of small BF16 products with 33 to 64 rows
// twice), many are A.
//
// K may be shared by the blocks of a cluster: each keeps the chains of its part in shared memory,
// then all of them add every chain of the tile in ascending order, a part of the tile each.
#include <algorithm>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/sm90_layout.h"
#include "ops/gemm/weight_scales.cuh"

namespace hadal::ops::cuda {
namespace {

/// Products of one x with several matrices in one launch: tiles of one matrix behind another's.
struct Products {
  LinearSm90Params first;  ///< with what all share
  Sm90Factor more[kMaxFactors - 1];
  int count;  ///< of matrices
};

/// Tiles of `rows` outputs.
__host__ __device__ inline int64_t tiles_of(int64_t w_groups, int rows) {
  return (w_groups * 8 + rows - 1) / rows;
}

/// The product that a tile belongs to, and the tile's number in it.
__device__ __forceinline__ LinearSm90Params product_of(const Products& all,
                                                       int rows,
                                                       int64_t& tile) {
  LinearSm90Params p = all.first;
  for (int i = 0; i + 1 < all.count; ++i) {
    const int64_t tiles = tiles_of(p.w_groups, rows);
    if (tile < tiles) break;
    tile -= tiles;
    const Sm90Factor& next = all.more[i];
    p.w = next.w;
    p.w_groups = next.w_groups;
    p.w_scale = next.w_scale;
    p.outputs = next.outputs;
    p.out = next.out;
  }
  return p;
}

/// Shared memory for the chains of a split product, beside the ring of a tile of so many rows.
constexpr int64_t chain_bytes(bool fp8, int64_t tile) {
  return (tile > 16 ? 64 : tile > 8 ? 128 : fp8 ? 96 : 32) * 1024;
}

/// kXIsA: the rows of x are operand A. kBatch: slabs multiplied between two waits, 1 or 2. With
/// four (16 matrix instructions, of 8 or 16 columns each) and three blocks on a processor one
/// warp's sums of a slab came out wrong in one of 11,000 warps (16 rows) or two million (8), with
/// neither shared memory nor registers at fault as far as could be seen; `StaysTheSame` of the
/// kernel test would see it.
template <bool kFp8, bool kXIsA, int kWarpgroups, int kN, int kStages, int kBatch>
struct Shape {
  static constexpr bool fp8 = kFp8, x_is_a = kXIsA;
  static constexpr int warpgroups = kWarpgroups, rows_a = 64 * kWarpgroups, rows_b = kN;
  static constexpr int stages = kStages, batch = kBatch;
  static constexpr int x_rows = kXIsA ? rows_a : rows_b, w_rows = kXIsA ? rows_b : rows_a;
  /// Slabs of one chain: 128 E4M3 inputs are a slab, 1,024 BF16 inputs 16 slabs.
  static constexpr int chain = kFp8 ? 1 : 16;
  static constexpr int a_bytes = rows_a * 128, b_bytes = rows_b * 128;
  static constexpr int scale_bytes = kFp8 ? x_rows * 4 : 0;
  static constexpr int stage_bytes = (a_bytes + b_bytes + scale_bytes + 1023) / 1024 * 1024;
  static constexpr int threads = kWarpgroup * kWarpgroups + 32;
  static constexpr int tile = rows_a * rows_b;
};

__device__ __forceinline__ void store(const Sm90Output& out, int64_t row, int64_t column, float v) {
  if (out.type == ElementType::kF32) {
    static_cast<float*>(out.y)[row * out.stride + column] = v;
  } else {
    static_cast<__nv_bfloat16*>(out.y)[row * out.stride + column] = __float2bfloat16_rn(v);
  }
}

template <typename S>
__device__ void produce(const LinearSm90Params& p,
                        int64_t a_group,
                        int64_t b_group,
                        int64_t begin,
                        int64_t end,
                        uint8_t* ring,
                        uint64_t* full,
                        uint64_t* empty) {
  const int64_t a_groups = S::x_is_a ? p.x_groups : p.w_groups;
  const int64_t b_groups = S::x_is_a ? p.w_groups : p.x_groups;
  const int64_t x_group = S::x_is_a ? a_group : b_group, w_group = S::x_is_a ? b_group : a_group;
  // The last tile may be shorter than the array of stages.
  const auto a_bytes =
      static_cast<uint32_t>(min(a_groups - a_group, int64_t{S::rows_a / 8}) * 1024);
  const auto b_bytes =
      static_cast<uint32_t>(min(b_groups - b_group, int64_t{S::rows_b / 8}) * 1024);
  const uint32_t scale_bytes = S::fp8 ? (S::x_is_a ? a_bytes : b_bytes) / 32 : 0;
  const auto w_bytes = S::x_is_a ? b_bytes : a_bytes, x_bytes = S::x_is_a ? a_bytes : b_bytes;
  const auto load_w = [&](int64_t slab, uint32_t stage) {
    uint8_t* at = ring + stage * S::stage_bytes + (S::x_is_a ? S::a_bytes : 0);
    barrier_arrive_expect(&full[stage], a_bytes + b_bytes + scale_bytes);
    bulk_copy(at, p.w + (slab * p.w_groups + w_group) * 1024, w_bytes, &full[stage]);
  };
  const auto load_x = [&](int64_t slab, uint32_t stage) {
    uint8_t* at = ring + stage * S::stage_bytes;
    bulk_copy(at + (S::x_is_a ? 0 : S::a_bytes), p.x + (slab * p.x_groups + x_group) * 1024,
              x_bytes, &full[stage]);
    if constexpr (S::fp8) {
      bulk_copy(at + S::a_bytes + S::b_bytes, p.x_scale + (slab * p.x_groups + x_group) * 8,
                scale_bytes, &full[stage]);
    }
  };
  // Weights are there before the kernel before us ends; what it writes may be x.
  const auto ahead = static_cast<uint32_t>(min(end - begin, int64_t{S::stages}));
  for (uint32_t stage = 0; stage < ahead; ++stage) load_w(begin + stage, stage);
  wait_for_previous();
  for (uint32_t stage = 0; stage < ahead; ++stage) load_x(begin + stage, stage);
  for (int64_t slab = begin + ahead; slab < end; ++slab) {
    const auto turn = static_cast<uint32_t>(slab - begin);
    const uint32_t stage = turn % S::stages;
    barrier_wait(&empty[stage], (turn / S::stages & 1) ^ 1);
    load_w(slab, stage);
    load_x(slab, stage);
  }
}

/// The chain of a slab, begun or gone on with, without waiting.
template <typename S>
__device__ __forceinline__ void multiply(float (&d)[S::rows_b / 2],
                                         const uint8_t* stage,
                                         int warpgroup,
                                         bool go_on) {
  const uint64_t a = operand_descriptor(smem_address(stage) + warpgroup * 64 * 128);
  const uint64_t b = operand_descriptor(smem_address(stage) + S::a_bytes);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int add = go_on || step > 0;
    if constexpr (S::fp8) {
      Wgmma<S::rows_b>::e4m3(d, a + step * 2, b + step * 2, add);
    } else {
      Wgmma<S::rows_b>::bf16(d, a + step * 2, b + step * 2, add);
    }
  }
}

/// The thread's value i of the tile lies at row thread_row(i), column thread_column(i).
__device__ __forceinline__ int thread_row(int i) {
  const int t = static_cast<int>(threadIdx.x) % kWarpgroup;
  return t / 32 * 16 + t % 32 / 4 + (i & 2) * 4;
}
__device__ __forceinline__ int thread_column(int i) {
  return i / 4 * 8 + static_cast<int>(threadIdx.x) % 4 * 2 + (i & 1);
}

/// run += chain * scales of the slab (E4M3) by one fused multiply-add, or the scaled chain alone.
template <typename S, bool kAlone>
__device__ __forceinline__ void scale_chain(float (&run)[S::rows_b / 2],
                                            const float (&chain)[S::rows_b / 2],
                                            const float* x_scale,
                                            float w_scale,
                                            int warpgroup) {
  if constexpr (S::x_is_a) {
    const float upper = x_scale[warpgroup * 64 + thread_row(0)] * w_scale;
    const float lower = x_scale[warpgroup * 64 + thread_row(2)] * w_scale;
#pragma unroll
    for (int i = 0; i < S::rows_b / 2; ++i) {
      const float scale = i & 2 ? lower : upper;
      run[i] = kAlone ? chain[i] * scale : fmaf(chain[i], scale, run[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < S::rows_b / 2; i += 4) {
      const float2 pair = *reinterpret_cast<const float2*>(x_scale + thread_column(i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float scale = (j & 1 ? pair.y : pair.x) * w_scale;
        run[i + j] = kAlone ? chain[i + j] * scale : fmaf(chain[i + j], scale, run[i + j]);
      }
    }
  }
}

/// The accumulators of a thread: of each E4M3 chain under way, or of the one BF16 chain.
template <typename S>
using Chains = float[S::fp8 ? S::batch : 1][S::rows_b / 2];

/// Where a warpgroup's chains of a split product go: [chain][tile].
template <typename S>
__device__ __forceinline__ void keep_chain(float* chains,
                                           int64_t chain,
                                           int warpgroup,
                                           const float (&v)[S::rows_b / 2]) {
  float* out = chains + chain * S::tile + warpgroup * 64 * S::rows_b;
#pragma unroll
  for (int j = 0; j < S::rows_b / 2; ++j) out[thread_row(j) * S::rows_b + thread_column(j)] = v[j];
}

/// Multiplies kCount slabs from `turn` on (counted from the part's begin) with one wait for all.
/// kKeep: every chain goes to `chains` instead of being added to `run`.
template <typename S, bool kKeep, int kCount>
__device__ __forceinline__ void multiply_slabs(Chains<S>& d,
                                               float (&run)[S::rows_b / 2],
                                               const WeightScales& scales,
                                               int64_t begin,
                                               int64_t end,
                                               int64_t turn,
                                               const uint8_t* ring,
                                               uint64_t* full,
                                               uint64_t* empty,
                                               float* chains) {
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  float w_scale[kCount];
  if constexpr (S::fp8) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) w_scale[i] = scales.of(turn + i);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const auto at = static_cast<uint32_t>(turn + i);
    barrier_wait(&full[at % S::stages], at / S::stages & 1);
  }
  const bool go_on = !S::fp8 && turn % S::chain != 0;
#pragma unroll
  for (int i = 0; i < (S::fp8 ? kCount : 1); ++i) keep(d[i]);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint8_t* stage = ring + static_cast<uint32_t>(turn + i) % S::stages * S::stage_bytes;
    multiply<S>(d[S::fp8 ? i : 0], stage, warpgroup, !S::fp8 && (i > 0 || go_on));
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < (S::fp8 ? kCount : 1); ++i) keep(d[i]);
  if constexpr (S::fp8) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t stage = static_cast<uint32_t>(turn + i) % S::stages;
      const auto* x_scale =
          reinterpret_cast<const float*>(ring + stage * S::stage_bytes + S::a_bytes + S::b_bytes);
      scale_chain<S, kKeep>(run, d[i], x_scale, w_scale[i], warpgroup);
      barrier_arrive(&empty[stage]);
      if constexpr (kKeep) keep_chain<S>(chains, turn + i, warpgroup, run);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      barrier_arrive(&empty[static_cast<uint32_t>(turn + i) % S::stages]);
    if ((turn + kCount) % S::chain == 0 || begin + turn + kCount == end) {
      if constexpr (kKeep) {
        keep_chain<S>(chains, turn / S::chain, warpgroup, d[0]);
      } else {
#pragma unroll
        for (int j = 0; j < S::rows_b / 2; ++j) run[j] += d[0][j];
      }
    }
  }
}

template <typename S, bool kKeep>
__device__ void consume(float (&run)[S::rows_b / 2],
                        const WeightScales& scales,
                        int64_t begin,
                        int64_t end,
                        const uint8_t* ring,
                        uint64_t* full,
                        uint64_t* empty,
                        float* chains) {
  Chains<S> d;
  int64_t turn = 0;
  for (; begin + turn + S::batch <= end; turn += S::batch)
    multiply_slabs<S, kKeep, S::batch>(d, run, scales, begin, end, turn, ring, full, empty, chains);
  for (; begin + turn < end; ++turn)
    multiply_slabs<S, kKeep, 1>(d, run, scales, begin, end, turn, ring, full, empty, chains);
}

template <typename S>
__device__ __forceinline__ void store_tile(
    const LinearSm90Params& p, int a, int b, int64_t a_first, int64_t b_first, float v) {
  const int64_t row = S::x_is_a ? a_first + a : b_first + b;
  const int64_t column = S::x_is_a ? b_first + b : a_first + a;
  if (row < p.rows && column < p.outputs) store(p.out, row, column, v);
}

/// Chains of a part of K.
template <typename S>
__host__ __device__ inline int64_t part_chains(int64_t slabs, int split) {
  const int64_t chains = (slabs + S::chain - 1) / S::chain;
  return (chains + split - 1) / split;
}

/// sum + the `count` chains of another block in ascending order; loads run ahead of the additions.
template <typename S>
__device__ __forceinline__ float add_chains(float sum, const float* chains, int from, int count) {
  constexpr int kAhead = 8;
  const auto rank = static_cast<uint32_t>(from);
  int first = 0;
  for (; first + kAhead <= count; first += kAhead) {
    float v[kAhead];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) v[j] = load_remote(chains + (first + j) * S::tile, rank);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) sum += v[j];
  }
  for (; first < count; ++first) sum += load_remote(chains + first * S::tile, rank);
  return sum;
}

template <typename S, bool kSplit>
__global__ void __launch_bounds__(S::threads, 1)
    linear_sm90_kernel(const __grid_constant__ Products all, int split) {
  extern __shared__ __align__(1024) uint8_t memory[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  __shared__ float near[S::fp8 ? WeightScales::kNear : 1];
  uint8_t* ring = memory;
  float* chains = reinterpret_cast<float*>(memory + S::stages * S::stage_bytes);

  const int64_t part = kSplit ? blockIdx.x % split : 0;
  int64_t tile_a = kSplit ? blockIdx.x / split : blockIdx.x, tile_b = blockIdx.y;
  const LinearSm90Params p = product_of(all, S::w_rows, S::x_is_a ? tile_b : tile_a);
  const int64_t a_first = tile_a * S::rows_a, b_first = tile_b * S::rows_b;
  const int64_t length = kSplit ? part_chains<S>(p.slabs, split) * S::chain : p.slabs;
  const int64_t begin = min(part * length, p.slabs), end = min(begin + length, p.slabs);

  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], S::warpgroups * kWarpgroup);
    }
    barrier_init_done();
  }
  __syncthreads();

  float run[S::rows_b / 2] = {};
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == S::warpgroups) {
    if (threadIdx.x == S::warpgroups * kWarpgroup)
      produce<S>(p, a_first / 8, b_first / 8, begin, end, ring, full, empty);
  } else {
    launch_dependents();
    // A tile's outputs share 128 that have one scale.
    static_assert(S::w_rows <= 128);
    const WeightScales scales(p, S::x_is_a ? b_first : a_first, begin, S::fp8 ? end : begin, near,
                              S::warpgroups * kWarpgroup);
    consume<S, kSplit>(run, scales, begin, end, ring, full, empty, chains);
  }
  wait_for_previous();  // it may read what we write
  if constexpr (kSplit) {
    cluster_sync();
    const auto all = static_cast<int>((p.slabs + S::chain - 1) / S::chain);
    const auto each = static_cast<int>(length / S::chain);
    for (int i = static_cast<int>(part * S::threads + threadIdx.x); i < S::tile;
         i += split * S::threads) {
      float sum = 0.0f;
      for (int from = 0; from * each < all; ++from)
        sum = add_chains<S>(sum, chains + i, from, min(each, all - from * each));
      store_tile<S>(p, i / S::rows_b, i % S::rows_b, a_first, b_first, sum);
    }
    cluster_sync();  // nobody leaves while its chains are read
  } else if (warpgroup < S::warpgroups) {
#pragma unroll
    for (int i = 0; i < S::rows_b / 2; ++i)
      store_tile<S>(p, warpgroup * 64 + thread_row(i), thread_column(i), a_first, b_first, run[i]);
  }
}

template <typename S, bool kSplit>
void launch(const Products& all, Stream stream, int split) {
  const LinearSm90Params& p = all.first;
  const unsigned x_tiles = blocks_for(p.x_groups * 8, S::x_rows);
  int64_t w_tiles = tiles_of(p.w_groups, S::w_rows);
  for (int i = 0; i + 1 < all.count; ++i) w_tiles += tiles_of(all.more[i].w_groups, S::w_rows);
  const int64_t chains = kSplit ? part_chains<S>(p.slabs, split) * S::tile * 4 : 0;
  const auto bytes = static_cast<size_t>(S::stages * S::stage_bytes + chains);
  auto* kernel = linear_sm90_kernel<S, kSplit>;
  if (bytes > 227 * 1024 - 2048)
    throw_kernel_error("linear_sm90", "this split of K does not fit into shared memory");
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  const unsigned w = blocks_for(w_tiles, 1);
  const dim3 grid((S::x_is_a ? x_tiles : w) * static_cast<unsigned>(split),
                  S::x_is_a ? w : x_tiles);
  launch_early(kernel, {grid, S::threads, bytes, static_cast<unsigned>(split)}, stream,
               "linear_sm90", all, split);
}

template <bool kFp8, int kN, int kStages, int kBatch>
void launch_few(const Products& p, Stream stream, int split) {
  using S = Shape<kFp8, false, 1, kN, kStages, kBatch>;
  if (split > 1) {
    launch<S, true>(p, stream, split);
  } else {
    launch<S, false>(p, stream, 1);
  }
}

/// Blocks that share K: as many as fill the card's 132 processors, up to 8, where each block's
/// chains fit beside its ring and are at least `least`.
int split_for(bool fp8, int64_t tiles, int64_t chains, int64_t tile, int least) {
  const int64_t tile_bytes = 64 * tile * 4, most = chain_bytes(fp8, tile);
  int split = 1;
  while (split < 8 && tiles * split * 2 <= 160 && chains >= split * 2 * least) split *= 2;
  while (split > 1 && split < 8 && (chains + split - 1) / split * tile_bytes > most) split *= 2;
  return split > 1 && (chains + split - 1) / split * tile_bytes > most ? 1 : split;
}

template <bool kFp8>
void linear(const LinearSm90Params& p,
            const Sm90Factor* more,
            int count,
            Stream stream,
            const Sm90Choice& choice) {
  if (p.rows == 0) return;
  if (count < 0 || count >= kMaxFactors)
    throw_kernel_error("linear_sm90", "too many matrices for one launch");
  Products all{.first = p, .more = {}, .count = 1 + count};
  for (int i = 0; i < count; ++i) all.more[i] = more[i];
  int tile = choice.tile, split = choice.split;
  if (tile < 0)
    tile = p.rows <= 8 ? 8 : p.rows <= 16 ? 16 : p.rows <= 32 ? 32 : p.rows <= 64 ? 64 : 0;
  const int64_t chains = kFp8 ? p.slabs : (p.slabs + 15) / 16;
  int64_t tiles = p.w_groups / 8;
  for (int i = 0; i < count; ++i) tiles += more[i].w_groups / 8;
  // BF16 chains are long: where blocks are few, so that reading weights twice costs nothing, rows
  // make more of them, and chains go to blocks of their own.
  const bool small = !kFp8 && choice.tile < 0 && (tile == 32 || tile == 64) && tiles <= 64;
  if (small) tile = 32, tiles *= (p.rows + 31) / 32;
  if (split < 0) {
    const bool shares = tile == 8 || tile == 16 || small;
    split = shares ? split_for(kFp8, tiles, chains, tile, kFp8 ? 2 : 1) : 1;
    if (small && split < 4) split = 1;
  }
  switch (tile) {
    case 8:
      // Where blocks share K there are few, and a ring may take what room the chains leave.
      if (split > 1)
        return launch<Shape<kFp8, false, 1, 8, kFp8 ? 12 : 16, 2>, true>(all, stream, split);
      return launch<Shape<kFp8, false, 1, 8, 7, 2>, false>(all, stream, 1);
    case 16:
      return launch_few<kFp8, 16, 6, 2>(all, stream, split);
    case 32:
      return launch_few<kFp8, 32, 8, 2>(all, stream, split);
    case 64:
      return launch_few<kFp8, 64, 8, 1>(all, stream, split);
    case 128:
      return launch<Shape<kFp8, false, 2, 128, 5, 1>, false>(all, stream, 1);
    case 256:
      return launch<Shape<kFp8, false, 1, 256, 4, 1>, false>(all, stream, 1);
    case 0:
      return launch<Shape<kFp8, true, 2, 128, 5, 1>, false>(all, stream, 1);
    default:
      throw_kernel_error("linear_sm90", "no kernel for this tile");
  }
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void linear_fp8_sm90(const LinearSm90Params& p, Stream stream, const Sm90Choice& choice) {
  cuda::linear<true>(p, nullptr, 0, stream, choice);
}

void linear_fp8_sm90(const LinearSm90Params& p, const Sm90Factor* more, int count, Stream stream) {
  cuda::linear<true>(p, more, count, stream, {});
}

void linear_bf16_sm90(const LinearSm90Params& p, Stream stream, const Sm90Choice& choice) {
  cuda::linear<false>(p, nullptr, 0, stream, choice);
}

void linear_bf16_sm90(const LinearSm90Params& p, const Sm90Factor* more, int count, Stream stream) {
  cuda::linear<false>(p, more, count, stream, {});
}

}  // namespace hadal::ops
