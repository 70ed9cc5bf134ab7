// Products of BF16 rows with E4M3 weights that are widened to BF16 on the way: weights are operand
// A and go from shared memory to registers, where a shift and a multiplication make BF16 of them
// (sm90_layout.h). Rows are operand B.
//
// A block takes kN rows of a group. Many: 64 outputs for each of its warpgroups. Few: 64 outputs,
// whose chains its warpgroups share and then add in order, since one chain after the other would
// take longer than the reads. One warp feeds the ring. A warpgroup widens half a slab while the
// half before is multiplied.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::cuda {
namespace {

using sm90::kWideTileBytes;

/// kShared: the warpgroups share the chains of one tile; else each has a tile of its own.
template <int kN, int kWarpgroups, int kStages, bool kShared>
struct WideShape {
  static constexpr bool shared = kShared;
  static constexpr int rows = kN, warpgroups = kWarpgroups, stages = kStages;
  static constexpr int tiles = kShared ? 1 : kWarpgroups;  ///< of a block
  static constexpr int parts = kShared ? kWarpgroups : 1;  ///< slabs of a stage, of as many chains
  /// A slab of 128 inputs: two of 128 bytes of x, and its tiles of weights.
  static constexpr int x_bytes = 2 * kN * 128;
  static constexpr int part_bytes = x_bytes + tiles * static_cast<int>(kWideTileBytes);
  static constexpr int stage_bytes = parts * part_bytes;
  /// Two warpgroups with many sums take registers of a third, which feeds the ring with one warp.
  static constexpr bool lends = kWarpgroups == 2;
  static constexpr int threads = kWarpgroup * kWarpgroups + (lends ? kWarpgroup : 32);
  static constexpr int chain = static_cast<int>(sm90::kBf16Chain) / 128;  ///< slabs
  static constexpr int tile = 64 * kN;

  /// Turns of the ring, and the slab that a part has in one: chains are dealt out to the parts.
  static __device__ __forceinline__ int turns(int slabs) {
    if (!kShared) return slabs;
    const int each = chain * parts;
    return slabs / each * chain + min(slabs % each, chain);
  }
  static __device__ __forceinline__ int slab(int turn, int part) {
    return kShared ? (turn / chain * parts + part) * chain + turn % chain : turn;
  }
};

/// A place in the ring.
template <typename S>
struct Turn {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    stage = stage + 1 == S::stages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

/// Two codes of a word (kFirst and the one behind it) to BF16: the sign in place, exponent and
/// fraction in the low bits of theirs, which is the value times 2^-120; then times `power`.
template <int kFirst>
__device__ __forceinline__ uint32_t widen(uint32_t word, __nv_bfloat162 power) {
  const uint32_t apart = __byte_perm(word, 0, kFirst == 0 ? 0x1404 : 0x3424);
  const uint32_t bits = (apart & 0x80008000u) | (apart >> 4 & 0x07f007f0u);
  __nv_bfloat162 pair;
  memcpy(&pair, &bits, 4);
  pair = __hmul2(pair, power);
  uint32_t wide;
  memcpy(&wide, &pair, 4);
  return wide;
}

/// Half a slab of a tile: operand A of four k steps.
__device__ __forceinline__ void widen_half(uint32_t (&a)[4][4],
                                           const uint8_t* tile,
                                           int half,
                                           __nv_bfloat162 power) {
  const auto* words =
      reinterpret_cast<const uint4*>(tile) + half * 2 * kWarpgroup + threadIdx.x % kWarpgroup;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 four = words[i * kWarpgroup];
    a[2 * i][0] = widen<0>(four.x, power), a[2 * i][2] = widen<2>(four.x, power);
    a[2 * i][1] = widen<0>(four.y, power), a[2 * i][3] = widen<2>(four.y, power);
    a[2 * i + 1][0] = widen<0>(four.z, power), a[2 * i + 1][2] = widen<2>(four.z, power);
    a[2 * i + 1][1] = widen<0>(four.w, power), a[2 * i + 1][3] = widen<2>(four.w, power);
  }
}

/// Feeds the ring. Weights are on their way before the kernel before us has ended; what it writes
/// may be x.
template <typename S>
__device__ void produce(const WidenedSm90Params& p,
                        uint8_t* ring,
                        uint64_t* full,
                        uint64_t* empty) {
  const int64_t tiles = p.outputs / 64, tile = blockIdx.x * S::tiles, group = blockIdx.z;
  const int64_t x_group = static_cast<int64_t>(blockIdx.y) * S::rows / 8;
  const auto slabs = static_cast<int>(p.slabs), turns = S::turns(slabs);
  const uint8_t* w = p.w + (group * slabs * tiles + tile) * kWideTileBytes;
  const uint8_t* x = p.x + (group * slabs * 2 * p.x_groups + x_group) * 1024;
  const auto w_bytes = static_cast<uint32_t>(min(tiles - tile, int64_t{S::tiles}) * kWideTileBytes);
  const auto x_bytes =
      static_cast<uint32_t>(min(p.x_groups - x_group, int64_t{S::rows / 8}) * 1024);
  const auto load_w = [&](int turn, uint32_t stage) {
    uint32_t parts = 0;
    for (int part = 0; part < S::parts; ++part) parts += S::slab(turn, part) < slabs;
    barrier_arrive_expect(&full[stage], parts * (w_bytes + 2 * x_bytes));
    for (int part = 0; part < S::parts; ++part) {
      const int64_t slab = S::slab(turn, part);
      if (slab < slabs)
        bulk_copy(ring + stage * S::stage_bytes + part * S::part_bytes + S::x_bytes,
                  w + slab * tiles * kWideTileBytes, w_bytes, &full[stage]);
    }
  };
  const auto load_x = [&](int turn, uint32_t stage) {
    for (int part = 0; part < S::parts; ++part) {
      const int64_t slab = S::slab(turn, part);
      for (int half = 0; half < 2 && slab < slabs; ++half)
        bulk_copy(ring + stage * S::stage_bytes + part * S::part_bytes + half * S::x_bytes / 2,
                  x + (slab * 2 + half) * p.x_groups * 1024, x_bytes, &full[stage]);
    }
  };
  const int ahead = min(turns, S::stages);
  for (int turn = 0; turn < ahead; ++turn) load_w(turn, static_cast<uint32_t>(turn));
  wait_for_previous();
  Turn<S> at;
  for (int turn = 0; turn < ahead; ++turn, at.next()) load_x(turn, at.stage);
  for (int turn = ahead; turn < turns; ++turn, at.next()) {
    barrier_wait(&empty[at.stage], at.parity ^ 1);
    load_w(turn, at.stage);
    load_x(turn, at.stage);
  }
}

template <typename S>
__device__ __forceinline__ void multiply_half(float (&d)[S::rows / 2],
                                              const uint32_t (&a)[4][4],
                                              const uint8_t* x,
                                              bool go_on) {
  const uint64_t b = operand_descriptor(smem_address(x));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step)
    Wgmma<S::rows>::bf16(d, a[step], b + step * 2, go_on || step > 0);
  wgmma_commit();
}

/// What lies in the block's shared memory: the ring, its barriers, and, where warpgroups share a
/// tile, all its chains.
struct Memory {
  uint8_t* ring;
  float *chains, *scales;
  uint64_t *full, *empty;
};

/// Slabs whose scales are brought before anybody needs them: one by one they would come from far.
constexpr int kNearScales = 256;

/// The chains of a warpgroup, added to `run` or kept.
template <typename S>
__device__ __forceinline__ void consume(const WidenedSm90Params& p,
                                        float (&run)[S::rows / 2],
                                        int64_t tile,
                                        const Memory& m) {
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int part = S::shared ? warpgroup : 0, own = S::shared ? 0 : warpgroup;
  const int64_t blocks = (p.outputs + 127) / 128;
  // The tiles of a block share 128 outputs, which have one scale.
  const float* scale = p.scales + static_cast<int64_t>(blockIdx.z) * p.slabs * blocks + tile / 2;
  const bool near = p.slabs <= kNearScales;
  if (near) {
    for (int i = static_cast<int>(threadIdx.x); i < p.slabs; i += S::warpgroups * kWarpgroup)
      m.scales[i] = scale[i * blocks];
    named_barrier_wait(1, S::warpgroups * kWarpgroup);
  }
  float d[S::rows / 2];
  uint32_t first[4][4], second[4][4];
  Turn<S> at;
  const auto slabs = static_cast<int>(p.slabs), turns = S::turns(slabs);
  for (int begin = 0; begin < turns; begin += S::chain) {
    uint64_t* before = nullptr;
    const int end = min(begin + S::chain, turns);
    const int last = S::slab(begin, part) + min(S::chain, slabs - S::slab(begin, part));
    keep(d);
    for (int turn = begin; turn < end; ++turn, at.next()) {
      const int slab = S::slab(turn, part);
      barrier_wait(&m.full[at.stage], at.parity);
      if (slab >= last) {  // this part's chain is shorter, or there is none
        if (before != nullptr) {
          wgmma_wait<0>();
          barrier_arrive(before);
        }
        before = &m.empty[at.stage];
        continue;
      }
      const uint8_t* stage = m.ring + at.stage * S::stage_bytes + part * S::part_bytes;
      const uint8_t* weights = stage + S::x_bytes + own * kWideTileBytes;
      // The block's scale, and the 2^120 that the codes lack.
      const __nv_bfloat162 power = __bfloat162bfloat162(__ushort_as_bfloat16(static_cast<uint16_t>(
          (__float_as_uint(near ? m.scales[slab] : scale[slab * blocks]) >> 16) + (120u << 7))));
      wgmma_wait<1>();  // who read `first`
      widen_half(first, weights, 0, power);
      multiply_half<S>(d, first, stage, turn > begin);
      wgmma_wait<1>();  // who read `second`, the end of the slab before
      if (before != nullptr) barrier_arrive(before);
      before = &m.empty[at.stage];
      widen_half(second, weights, 1, power);
      multiply_half<S>(d, second, stage + S::x_bytes / 2, true);
    }
    wgmma_wait<0>();
    keep(d);
    barrier_arrive(before);
    if constexpr (S::shared) {
      if (last <= S::slab(begin, part)) continue;
      float* chain = m.chains + S::slab(begin, part) / S::chain * S::tile;
#pragma unroll
      for (int i = 0; i < S::rows / 2; ++i) chain[i * kWarpgroup + threadIdx.x % kWarpgroup] = d[i];
    } else {
#pragma unroll
      for (int i = 0; i < S::rows / 2; ++i) run[i] = run[i] + d[i];
    }
  }
}

/// Value i of thread t of a warpgroup's sums.
template <typename S>
__device__ __forceinline__ void store_sum(
    const WidenedSm90Params& p, int64_t tile, int t, int i, float sum) {
  const int64_t row = static_cast<int64_t>(blockIdx.y) * S::rows + i / 4 * 8 + t % 4 * 2 + (i & 1);
  const int64_t column = static_cast<int64_t>(blockIdx.z) * p.outputs + tile * 64 + t / 32 * 16 +
                         t % 32 / 4 + (i & 2) * 4;
  if (row < p.rows) p.out[row * p.stride + column] = __bfloat16_as_ushort(__float2bfloat16_rn(sum));
}

template <typename S>
__global__ void __launch_bounds__(S::threads, 1)
    widened_kernel(const __grid_constant__ WidenedSm90Params p) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  __shared__ float scales[kNearScales];
  const Memory m = {ring, reinterpret_cast<float*>(ring + S::stages * S::stage_bytes), scales, full,
                    empty};
  constexpr int kConsumers = S::warpgroups * kWarpgroup;
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], kConsumers);
    }
    barrier_init_done();
  }
  __syncthreads();
  launch_dependents();
  const auto thread = static_cast<int>(threadIdx.x), warpgroup = thread / kWarpgroup;
  if (warpgroup == S::warpgroups) {
    if constexpr (S::lends) fewer_registers<40>();
    if (thread == kConsumers) produce<S>(p, ring, full, empty);
    return;
  }
  if constexpr (S::lends) more_registers<232>();
  const int64_t tiles = p.outputs / 64;
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * S::tiles + (S::shared ? 0 : warpgroup);
  float run[S::rows / 2] = {};
  consume<S>(p, run, min(tile, tiles - 1), m);
  wait_for_previous();  // it may read what we write
  if constexpr (S::shared) {
    named_barrier_wait(1, kConsumers);
    const auto chains = static_cast<int>((p.slabs + S::chain - 1) / S::chain);
    for (int at = thread; at < S::tile; at += kConsumers) {
      float sum = 0.0f;
      for (int chain = 0; chain < chains; ++chain) sum = sum + m.chains[chain * S::tile + at];
      store_sum<S>(p, tile, at % kWarpgroup, at / kWarpgroup, sum);
    }
  } else if (tile < tiles) {
#pragma unroll
    for (int i = 0; i < S::rows / 2; ++i) store_sum<S>(p, tile, thread % kWarpgroup, i, run[i]);
  }
}

template <typename S>
void launch(const WidenedSm90Params& p, Stream stream) {
  auto* kernel = widened_kernel<S>;
  const int64_t chains = S::shared ? (p.slabs + S::chain - 1) / S::chain * S::tile * 4 : 0;
  const auto bytes = static_cast<size_t>(S::stages * S::stage_bytes + chains);
  if (bytes > 227 * 1024 - 2048)
    throw_kernel_error("widened_sm90", "too many inputs for this tile");
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(bytes));
  const dim3 grid(blocks_for(p.outputs / 64, S::tiles), blocks_for(p.rows, S::rows),
                  static_cast<unsigned>(p.groups));
  launch_early(kernel, {grid, S::threads, bytes}, stream, "widened_sm90", p);
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void widened_sm90(const WidenedSm90Params& p, Stream stream, const Sm90Choice& choice) {
  if (p.rows == 0) return;
  int tile = choice.tile;
  if (tile < 0)
    tile = p.rows <= 8 ? 8 : p.rows <= 16 ? 16 : p.rows <= 32 ? 32 : p.rows <= 64 ? 64 : 128;
  switch (tile) {
    case 8:
      return cuda::launch<cuda::WideShape<8, 4, 4, true>>(p, stream);
    case 16:
      return cuda::launch<cuda::WideShape<16, 4, 3, true>>(p, stream);
    case 32:
      return cuda::launch<cuda::WideShape<32, 4, 2, true>>(p, stream);
    case 64:
      return cuda::launch<cuda::WideShape<64, 1, 4, false>>(p, stream);
    case 128:
      return cuda::launch<cuda::WideShape<128, 2, 4, false>>(p, stream);
    default:
      throw_kernel_error("widened_sm90", "no kernel for this tile");
  }
}

}  // namespace hadal::ops
