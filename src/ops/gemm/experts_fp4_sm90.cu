// Products with FP4 weights, grouped by expert: weights are operand A and go from shared memory to
// registers, where a look-up makes E4M3 of them, with their group's exponent folded in
// (sm90_layout.h).
//
// A block takes 64 outputs of one expert and kN of its rows at a time. One warp feeds the ring; one
// warpgroup decodes and multiplies. Several blocks share a processor, and the hardware hands out
// blocks as places become free: a grid of resident blocks with a loop inside was slower at every
// size, since blocks of the next launch crowd the processors that are free first.
#include "ops/cuda/fp4.cuh"
#include "ops/gemm/experts_sm90.cuh"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::cuda {
namespace {

template <int kN, int kStages>
struct Fp4Shape {
  static constexpr int rows = kN, stages = kStages, batch = kN <= 32 ? 2 : 1;
  static constexpr int x_bytes = kN * 128, scale_bytes = kN * 4;
  static constexpr int w_bytes = static_cast<int>(sm90::kFp4TileBytes);
  static constexpr int w_at = x_bytes, scale_at = x_bytes + w_bytes;
  static constexpr int stage_bytes = (scale_at + scale_bytes + 1023) / 1024 * 1024;
  static constexpr int threads = kWarpgroup + 32;
  static constexpr bool scaled = true, padded = false;
};

/// A slab decoded: operand A of its four k steps, and the power of two of the thread's two rows.
struct Slab {
  uint32_t a[4][4];
  float upper, lower;
};

__device__ __forceinline__ void decode_slab(Slab& slab, const uint8_t* w, const uint2* table) {
  const int t = static_cast<int>(threadIdx.x);
  const auto* exponents = reinterpret_cast<const uint32_t*>(w + 4096) + t / 32 * 16 + t % 32 / 4;
  const uint32_t upper = exponents[0], lower = exponents[8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint4 words = *reinterpret_cast<const uint4*>(w + half * 2048 + t * 16);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t(&a)[4] = slab.a[half * 2 + i];
      const int shift = 16 + 4 * (half * 2 + i);
      decode_fp4_tile(i == 0 ? words.x : words.z, table[upper >> shift & 15], a[0], a[2]);
      decode_fp4_tile(i == 0 ? words.y : words.w, table[lower >> shift & 15], a[1], a[3]);
    }
  }
  slab.upper = __uint_as_float(((upper & 255) - 6) << 23);
  slab.lower = __uint_as_float(((lower & 255) - 6) << 23);
}

/// run += the chain, scaled.
template <typename S>
__device__ __forceinline__ void add_chain(float (&run)[S::rows / 2],
                                          const float (&d)[S::rows / 2],
                                          const Slab& slab,
                                          const uint8_t* stage) {
  const auto* x_scale = reinterpret_cast<const float*>(stage + S::scale_at) + threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < S::rows / 2; j += 4) {
    const float2 x = *reinterpret_cast<const float2*>(x_scale + j * 2);
    run[j] = fmaf(d[j] * slab.upper, x.x, run[j]);
    run[j + 1] = fmaf(d[j + 1] * slab.upper, x.y, run[j + 1]);
    run[j + 2] = fmaf(d[j + 2] * slab.lower, x.x, run[j + 2]);
    run[j + 3] = fmaf(d[j + 3] * slab.lower, x.y, run[j + 3]);
  }
}

/// Decodes kCount slabs, multiplies them with one wait, and adds their chains in order.
template <typename S, int kCount>
__device__ __forceinline__ void multiply_some(float (&run)[S::rows / 2],
                                              const uint8_t* ring,
                                              uint64_t* full,
                                              uint64_t* empty,
                                              const uint2* table,
                                              Turn<S>& turn) {
  Slab slab[kCount];
  float d[kCount][S::rows / 2];
  const uint8_t* stage[kCount];
  uint64_t* done[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i, turn.next()) {
    stage[i] = ring + turn.stage * S::stage_bytes;
    done[i] = &empty[turn.stage];
    barrier_wait(&full[turn.stage], turn.parity);
    decode_slab(slab[i], stage[i] + S::w_at, table);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) keep(d[i]);
  wgmma_fence();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint64_t b = operand_descriptor(smem_address(stage[i]));
#pragma unroll
    for (int step = 0; step < 4; ++step)
      Wgmma<S::rows>::e4m3(d[i], slab[i].a[step], b + step * 2, step > 0);
  }
  wgmma_commit();
  wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    keep(d[i]);
    add_chain<S>(run, d[i], slab[i], stage[i]);
    barrier_arrive(done[i]);
  }
}

template <typename S>
__global__ void __launch_bounds__(S::threads)
    experts_fp4_kernel(const __grid_constant__ ExpertsSm90Params both) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
  __shared__ uint2 table[16];
  ExpertsSm90Params p = both;
  if (blockIdx.z != 0) {
    p.w = both.second_w;
    p.out = both.second_out;
  }
  if (threadIdx.x < 16) table[threadIdx.x] = fp4_codes(min(static_cast<int>(threadIdx.x), 14));
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::stages; ++i) {
      barrier_init(&full[i], 1);
      barrier_init(&empty[i], kWarpgroup);
    }
    barrier_init_done();
  }
  __syncthreads();
  launch_dependents();
  if (static_cast<int>(blockIdx.y) >= *p.num_runs) return;
  const ExpertItem item = {p.runs[blockIdx.y], blockIdx.x};
  if (threadIdx.x >= kWarpgroup) {
    if (threadIdx.x == kWarpgroup) produce_slabs<S>(p, item, ring, full, empty);
    return;
  }
  Turn<S> turn;
  for (int64_t first = 0; first < item.run.rows; first += S::rows) {
    float run[S::rows / 2] = {};
    const int slabs = static_cast<int>(p.slabs);
    for (int i = 0; i + S::batch <= slabs; i += S::batch)
      multiply_some<S, S::batch>(run, ring, full, empty, table, turn);
    if (slabs % S::batch != 0) multiply_some<S, 1>(run, ring, full, empty, table, turn);
    if (first == 0) wait_for_previous();  // it may read what we write
    store_rows<S>(p.out, run, item.run.first_row + first,
                  min(item.run.rows - first, int64_t{S::rows}), item.tile * 64, p.outputs);
  }
}

template <typename S>
void launch(const ExpertsSm90Params& p, Stream stream) {
  auto* kernel = experts_fp4_kernel<S>;
  constexpr int kBytes = S::stages * S::stage_bytes;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const dim3 grid(static_cast<unsigned>(p.outputs / 64), static_cast<unsigned>(p.max_runs),
                  p.second_w != nullptr ? 2u : 1u);
  launch_early(kernel, {grid, S::threads, kBytes}, stream, "experts_fp4_sm90", p);
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void experts_fp4_sm90(const ExpertsSm90Params& p, Stream stream, const Sm90Choice& choice) {
  if (p.max_runs == 0) return;
  switch (choice.tile < 0 ? 8 : choice.tile) {
    case 8:
      return cuda::launch<cuda::Fp4Shape<8, 7>>(p, stream);
    case 16:
      return cuda::launch<cuda::Fp4Shape<16, 6>>(p, stream);
    case 32:
      return cuda::launch<cuda::Fp4Shape<32, 5>>(p, stream);
    case 64:
      return cuda::launch<cuda::Fp4Shape<64, 5>>(p, stream);
    case 128:
      return cuda::launch<cuda::Fp4Shape<128, 4>>(p, stream);
    default:
      throw_kernel_error("experts_fp4_sm90", "no kernel for this tile");
  }
}

}  // namespace hadal::ops
