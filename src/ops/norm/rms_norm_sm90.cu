// A block a row (ops/cuda/rms_norm_row.cuh).
#include "ops/cuda/launch.cuh"
#include "ops/cuda/rms_norm_row.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/norm/rms_norm_sm90.h"

namespace hadal::ops::cuda {
namespace {

__global__ void __launch_bounds__(kNormThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormSm90Params p) {
  extern __shared__ __align__(16) float row[];
  wait_for_previous();
  launch_dependents();
  const int64_t first = blockIdx.x * p.dim;
  auto* out = static_cast<__nv_bfloat16*>(p.out) + first;
  rms_norm_row(static_cast<const __nv_bfloat16*>(p.x) + first, p.weight, static_cast<int>(p.dim),
               p.eps, p.bf16_chain, row, [&](int i, float4 y) { store4(out + i, y); });
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
                     {cuda::blocks_for(p.rows, 1), cuda::kNormThreads, bytes}, stream,
                     "rms_norm_sm90", p);
}

}  // namespace hadal::ops
