// One block a row, held in shared memory; sixteen lanes add it in the order of the CPU's vectors.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/rows.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/norm/rms_norm_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormSm90Params p) {
  extern __shared__ __align__(16) float row[];
  __shared__ float shared_rstd;
  wait_for_previous();
  launch_dependents();
  const int t = static_cast<int>(threadIdx.x), dim = static_cast<int>(p.dim);
  const auto* x = static_cast<const __nv_bfloat16*>(p.x) + blockIdx.x * p.dim;
  auto* out = static_cast<__nv_bfloat16*>(p.out) + blockIdx.x * p.dim;
  for (int i = t * 4; i < dim; i += kThreads * 4) store4(row + i, load4(x + i));
  __syncthreads();
  if (t < 32) {
    const int lane = t % 16;
    float squares = 0.0f;
    if (p.bf16_chain) {
#pragma unroll 32
      for (int i = lane; i < dim; i += 16)
        squares = squares + round_to<__nv_bfloat16>(row[i] * row[i]);
    } else {
#pragma unroll 32
      for (int i = lane; i < dim; i += 16) squares = fmaf(row[i], row[i], squares);
    }
    const float sum = sum_of_lanes(squares);
    const auto round = [&](float v) { return p.bf16_chain ? round_to<__nv_bfloat16>(v) : v; };
    const float mean = round(sum / static_cast<float>(dim));
    if (t == 0) shared_rstd = round(1.0f / sqrtf(round(mean + p.eps)));
  }
  __syncthreads();
  const float rstd = shared_rstd;
  for (int i = t * 4; i < dim; i += kThreads * 4) {
    float4 y = load4(row + i);
    y = make_float4(y.x * rstd, y.y * rstd, y.z * rstd, y.w * rstd);
    if (p.weight != nullptr) {
      const float4 w = load4(p.weight + i);
      y = make_float4(w.x * y.x, w.y * y.y, w.z * y.z, w.w * y.w);
    }
    store4(out + i, y);
  }
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void rms_norm_sm90(const RmsNormSm90Params& p, Stream stream) {
  if (p.rows == 0) return;
  if (!serves_rms_norm_sm90(p.dim))
    throw_kernel_error("rms_norm_sm90", "rows of a multiple of 8 values, 16,384 at most");
  const auto bytes = static_cast<size_t>(p.dim * 4);
  cudaFuncSetAttribute(cuda::rms_norm_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
  cuda::launch_early(cuda::rms_norm_kernel,
                     {cuda::blocks_for(p.rows, 1), cuda::kThreads, static_cast<size_t>(bytes)},
                     stream, "rms_norm_sm90", p);
}

}  // namespace hadal::ops
