// Products with FP8 and BF16 weights, grouped by expert: operands of both lie in shared memory, the
// weights are the 64-row one. Trees and layouts are those of linear_sm90.cu.
#include "ops/gemm/experts_sm90.cuh"

namespace hadal::ops::cuda {
namespace {

/// kBatch: slabs multiplied between two waits, a divisor of 16.
template <bool kFp8, int kN, int kStages, int kBatch>
struct Shape {
  static constexpr bool fp8 = kFp8, scaled = kFp8, padded = true;
  static constexpr int rows = kN, stages = kStages, batch = kBatch;
  /// Slabs of one chain: 128 E4M3 inputs are a slab, 1,024 BF16 inputs 16 slabs.
  static constexpr int chain = kFp8 ? 1 : 16;
  static constexpr int w_bytes = 64 * 128, x_bytes = kN * 128;
  static constexpr int w_at = x_bytes, scale_at = x_bytes + w_bytes;
  static constexpr int stage_bytes = (scale_at + (kFp8 ? kN * 4 : 0) + 1023) / 1024 * 1024;
  static constexpr int threads = kWarpgroup + 32;
};

/// The accumulators of a thread: of each E4M3 chain under way, or of the one BF16 chain.
template <typename S>
using Chains = float[S::fp8 ? S::batch : 1][S::rows / 2];

/// The chain of a slab, begun or gone on with, without waiting.
template <typename S>
__device__ __forceinline__ void multiply(float (&d)[S::rows / 2],
                                         const uint8_t* stage,
                                         bool go_on) {
  const uint64_t a = operand_descriptor(smem_address(stage + S::w_at));
  const uint64_t b = operand_descriptor(smem_address(stage));
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const int add = go_on || step > 0;
    if constexpr (S::fp8) {
      Wgmma<S::rows>::e4m3(d, a + step * 2, b + step * 2, add);
    } else {
      Wgmma<S::rows>::bf16(d, a + step * 2, b + step * 2, add);
    }
  }
}

/// run += chain * scales of the slab by one fused multiply-add.
template <typename S>
__device__ __forceinline__ void add_scaled(float (&run)[S::rows / 2],
                                           const float (&chain)[S::rows / 2],
                                           const uint8_t* stage,
                                           float w_scale) {
  const auto* x_scale = reinterpret_cast<const float*>(stage + S::scale_at) + threadIdx.x % 4 * 2;
#pragma unroll
  for (int i = 0; i < S::rows / 2; i += 4) {
    const float2 pair = *reinterpret_cast<const float2*>(x_scale + i * 2);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      run[i + j] = fmaf(chain[i + j], (j & 1 ? pair.y : pair.x) * w_scale, run[i + j]);
  }
}

/// A warpgroup at its item.
template <typename S>
struct Consumer {
  const ExpertsSm90Params& p;
  const float* w_scale;  ///< of the item's outputs, slab by slab
  const uint8_t* ring;
  uint64_t *full, *empty;
  Turn<S> turn;

  /// Multiplies kCount slabs from `slab` on with one wait.
  template <int kCount>
  __device__ __forceinline__ void multiply_some(float (&run)[S::rows / 2], Chains<S>& d, int slab) {
    const uint8_t* stage[kCount];
    uint64_t* done[kCount];
    float scale[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i, turn.next()) {
      if constexpr (S::fp8) scale[i] = __ldg(w_scale + (slab + i) * ((p.outputs + 127) / 128));
      stage[i] = ring + turn.stage * S::stage_bytes;
      done[i] = &empty[turn.stage];
      barrier_wait(&full[turn.stage], turn.parity);
    }
#pragma unroll
    for (int i = 0; i < (S::fp8 ? kCount : 1); ++i) keep(d[i]);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      multiply<S>(d[S::fp8 ? i : 0], stage[i], !S::fp8 && (slab + i) % S::chain != 0);
    wgmma_commit();
    wgmma_wait<0>();
#pragma unroll
    for (int i = 0; i < (S::fp8 ? kCount : 1); ++i) keep(d[i]);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if constexpr (S::fp8) add_scaled<S>(run, d[i], stage[i], scale[i]);
      barrier_arrive(done[i]);
    }
    if constexpr (!S::fp8) {
      if ((slab + kCount) % S::chain != 0 && slab + kCount != p.slabs) return;
#pragma unroll
      for (int j = 0; j < S::rows / 2; ++j) run[j] += d[0][j];
    }
  }

  __device__ __forceinline__ void multiply_rows(float (&run)[S::rows / 2]) {
    Chains<S> d;
    const int slabs = static_cast<int>(p.slabs);
    int slab = 0;
    for (; slab + S::batch <= slabs; slab += S::batch) multiply_some<S::batch>(run, d, slab);
    for (; slab < slabs; ++slab) multiply_some<1>(run, d, slab);
  }
};

template <typename S>
__global__ void __launch_bounds__(S::threads)
    experts_kernel(const __grid_constant__ ExpertsSm90Params p) {
  extern __shared__ __align__(1024) uint8_t ring[];
  __shared__ uint64_t full[S::stages], empty[S::stages];
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
  const float* w_scale =
      S::fp8 ? p.w_scale + item.run.expert * p.slabs * ((p.outputs + 127) / 128) + item.tile / 2
             : nullptr;
  Consumer<S> consumer = {p, w_scale, ring, full, empty, {}};
  for (int64_t first = 0; first < item.run.rows; first += S::rows) {
    float run[S::rows / 2] = {};
    consumer.multiply_rows(run);
    if (first == 0) wait_for_previous();  // it may read what we write
    store_rows<S>(p.out, run, item.run.first_row + first,
                  min(item.run.rows - first, int64_t{S::rows}), item.tile * 64, p.outputs);
  }
}

template <typename S>
void launch(const ExpertsSm90Params& p, Stream stream) {
  auto* kernel = experts_kernel<S>;
  constexpr int kBytes = S::stages * S::stage_bytes;
  static_assert(kBytes <= 226 * 1024);
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  const dim3 grid(blocks_for(p.outputs, 64), static_cast<unsigned>(p.max_runs));
  launch_early(kernel, {grid, S::threads, kBytes}, stream, "experts_sm90", p);
}

template <bool kFp8>
void multiply_experts(const ExpertsSm90Params& p, Stream stream, const Sm90Choice& choice) {
  if (p.max_runs == 0) return;
  switch (choice.tile < 0 ? 8 : choice.tile) {
    case 8:
      return launch<Shape<kFp8, 8, 6, 2>>(p, stream);
    case 16:
      return launch<Shape<kFp8, 16, 6, 2>>(p, stream);
    case 32:
      return launch<Shape<kFp8, 32, 6, 2>>(p, stream);
    case 64:
      return launch<Shape<kFp8, 64, 4, 1>>(p, stream);
    case 128:
      return launch<Shape<kFp8, 128, 4, 1>>(p, stream);
    default:
      throw_kernel_error("experts_sm90", "no kernel for this tile");
  }
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void experts_fp8_sm90(const ExpertsSm90Params& p, Stream stream, const Sm90Choice& choice) {
  cuda::multiply_experts<true>(p, stream, choice);
}

void experts_bf16_sm90(const ExpertsSm90Params& p, Stream stream, const Sm90Choice& choice) {
  cuda::multiply_experts<false>(p, stream, choice);
}

}  // namespace hadal::ops
