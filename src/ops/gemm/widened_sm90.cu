// Products of BF16 rows with E4M3 weights that are widened to BF16 on the way: weights are operand
// A and go from shared memory to registers, where a shift and a multiplication make BF16 of them
// (sm90_layout.h). Rows are operand B.
//
// A block takes 64 outputs of a group for each of its warpgroups, and kN of the rows. One warp
// feeds the ring. A warpgroup widens half a slab while the half before is multiplied.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::cuda {
namespace {

using sm90::kWideTileBytes;

template <int kN, int kWarpgroups, int kStages>
struct WideShape {
  static constexpr int rows = kN, warpgroups = kWarpgroups, stages = kStages;
  /// A slab of 128 inputs: two of 128 bytes of x, and the warpgroups' tiles.
  static constexpr int x_bytes = 2 * kN * 128;
  static constexpr int stage_bytes = x_bytes + kWarpgroups * static_cast<int>(kWideTileBytes);
  /// Two warpgroups take registers of a third, which feeds the ring with one warp.
  static constexpr bool lends = kWarpgroups == 2;
  static constexpr int threads = kWarpgroup * kWarpgroups + (lends ? kWarpgroup : 32);
  static constexpr int chain = static_cast<int>(sm90::kBf16Chain) / 128;  ///< slabs
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
  const int64_t tiles = p.outputs / 64, tile = blockIdx.x * S::warpgroups, group = blockIdx.z;
  const int64_t x_group = static_cast<int64_t>(blockIdx.y) * S::rows / 8;
  const uint8_t* w = p.w + (group * p.slabs * tiles + tile) * kWideTileBytes;
  const uint8_t* x = p.x + (group * p.slabs * 2 * p.x_groups + x_group) * 1024;
  const auto w_bytes =
      static_cast<uint32_t>(min(tiles - tile, int64_t{S::warpgroups}) * kWideTileBytes);
  const auto x_bytes =
      static_cast<uint32_t>(min(p.x_groups - x_group, int64_t{S::rows / 8}) * 1024);
  const auto load_w = [&](int64_t slab, uint32_t stage) {
    barrier_arrive_expect(&full[stage], w_bytes + 2 * x_bytes);
    bulk_copy(ring + stage * S::stage_bytes + S::x_bytes, w + slab * tiles * kWideTileBytes,
              w_bytes, &full[stage]);
  };
  const auto load_x = [&](int64_t slab, uint32_t stage) {
    for (int half = 0; half < 2; ++half)
      bulk_copy(ring + stage * S::stage_bytes + half * S::x_bytes / 2,
                x + (slab * 2 + half) * p.x_groups * 1024, x_bytes, &full[stage]);
  };
  const auto ahead = static_cast<uint32_t>(min(p.slabs, int64_t{S::stages}));
  for (uint32_t stage = 0; stage < ahead; ++stage) load_w(stage, stage);
  wait_for_previous();
  Turn<S> turn;
  for (uint32_t stage = 0; stage < ahead; ++stage, turn.next()) load_x(stage, stage);
  for (int64_t slab = ahead; slab < p.slabs; ++slab, turn.next()) {
    barrier_wait(&empty[turn.stage], turn.parity ^ 1);
    load_w(slab, turn.stage);
    load_x(slab, turn.stage);
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

template <typename S>
__device__ __forceinline__ void consume(const WidenedSm90Params& p,
                                        float (&run)[S::rows / 2],
                                        int64_t tile,
                                        const uint8_t* ring,
                                        uint64_t* full,
                                        uint64_t* empty) {
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  const int64_t blocks = (p.outputs + 127) / 128;
  const float* scale = p.scales + static_cast<int64_t>(blockIdx.z) * p.slabs * blocks + tile / 2;
  float d[S::rows / 2];
  uint32_t first[4][4], second[4][4];
  Turn<S> turn;
  const auto slabs = static_cast<int>(p.slabs);
  for (int begin = 0; begin < slabs; begin += S::chain) {
    uint64_t* before = nullptr;
    const int end = min(begin + S::chain, slabs);
    keep(d);
    for (int slab = begin; slab < end; ++slab, turn.next()) {
      const uint8_t* stage = ring + turn.stage * S::stage_bytes;
      const uint8_t* weights = stage + S::x_bytes + warpgroup * kWideTileBytes;
      // The block's scale, and the 2^120 that the codes lack.
      const __nv_bfloat162 power = __bfloat162bfloat162(__ushort_as_bfloat16(
          static_cast<uint16_t>((__float_as_uint(scale[slab * blocks]) >> 16) + (120u << 7))));
      barrier_wait(&full[turn.stage], turn.parity);
      wgmma_wait<1>();  // who read `first`
      widen_half(first, weights, 0, power);
      multiply_half<S>(d, first, stage, slab > begin);
      wgmma_wait<1>();  // who read `second`, the end of the slab before
      if (before != nullptr) barrier_arrive(before);
      before = &empty[turn.stage];
      widen_half(second, weights, 1, power);
      multiply_half<S>(d, second, stage + S::x_bytes / 2, true);
    }
    wgmma_wait<0>();
    keep(d);
    barrier_arrive(before);
#pragma unroll
    for (int i = 0; i < S::rows / 2; ++i) run[i] = run[i] + d[i];
  }
}

template <typename S>
__global__ void __launch_bounds__(S::threads, 1)
    widened_kernel(const __grid_constant__ WidenedSm90Params p) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], S::warpgroups * kWarpgroup);
    }
    barrier_init_done();
  }
  __syncthreads();
  launch_dependents();
  const int warpgroup = static_cast<int>(threadIdx.x) / kWarpgroup;
  if (warpgroup == S::warpgroups) {
    if constexpr (S::lends) fewer_registers<40>();
    if (threadIdx.x == S::warpgroups * kWarpgroup) produce<S>(p, ring, full, empty);
    return;
  }
  if constexpr (S::lends) more_registers<232>();
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * S::warpgroups + warpgroup;
  const int64_t tiles = p.outputs / 64, first = static_cast<int64_t>(blockIdx.y) * S::rows;
  float run[S::rows / 2] = {};
  consume<S>(p, run, min(tile, tiles - 1), ring, full, empty);
  wait_for_previous();  // it may read what we write
  if (tile >= tiles) return;
  const int t = static_cast<int>(threadIdx.x) % kWarpgroup;
  auto* out =
      p.out + static_cast<int64_t>(blockIdx.z) * p.outputs + tile * 64 + t / 32 * 16 + t % 32 / 4;
#pragma unroll
  for (int j = 0; j < S::rows / 2; ++j) {
    const int64_t row = first + j / 4 * 8 + t % 4 * 2 + (j & 1);
    if (row < p.rows)
      out[row * p.stride + (j & 2) * 4] = __bfloat16_as_ushort(__float2bfloat16_rn(run[j]));
  }
}

template <typename S>
void launch(const WidenedSm90Params& p, Stream stream) {
  auto* kernel = widened_kernel<S>;
  constexpr int kBytes = S::stages * S::stage_bytes;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const dim3 grid(blocks_for(p.outputs / 64, S::warpgroups), blocks_for(p.rows, S::rows),
                  static_cast<unsigned>(p.groups));
  launch_early(kernel, {grid, S::threads, kBytes}, stream, "widened_sm90", p);
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
      return cuda::launch<cuda::WideShape<8, 1, 6>>(p, stream);
    case 16:
      return cuda::launch<cuda::WideShape<16, 1, 6>>(p, stream);
    case 32:
      return cuda::launch<cuda::WideShape<32, 1, 5>>(p, stream);
    case 64:
      return cuda::launch<cuda::WideShape<64, 1, 4>>(p, stream);
    case 128:
      return cuda::launch<cuda::WideShape<128, 2, 4>>(p, stream);
    default:
      throw_kernel_error("widened_sm90", "no kernel for this tile");
  }
}

}  // namespace hadal::ops
