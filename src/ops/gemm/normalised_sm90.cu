// A block a row (ops/cuda/rms_norm_row.cuh), and one for each row of zeros behind them.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/rms_norm_row.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/gemm/normalised_sm90.h"
#include "ops/gemm/operand_rows.cuh"

namespace hadal::ops::cuda {
namespace {

__device__ __forceinline__ void store_operands(const NormalisedSm90Params& p, int i, float4 v) {
  if (p.codes != nullptr) store_quantised(v, blockIdx.x, i / 128, p.codes, p.scales, p.x_groups);
  if (p.operand != nullptr) store_low(v, blockIdx.x, i, p.operand, p.x_groups);
}

__global__ void __launch_bounds__(kNormThreads)
    normalised_kernel(const __grid_constant__ NormalisedSm90Params p) {
  extern __shared__ __align__(16) float row[];
  const int dim = static_cast<int>(p.dim);
  for (int i = static_cast<int>(threadIdx.x) * 32; i < dim; i += kNormThreads * 32)
    prefetch_constant(p.weight + i);
  wait_for_previous();
  launch_dependents();
  if (blockIdx.x >= p.rows) {
    for (int i = static_cast<int>(threadIdx.x) * 4; i < dim; i += kNormThreads * 4)
      store_operands(p, i, make_float4(0, 0, 0, 0));
    return;
  }
  const int64_t first = blockIdx.x * p.dim;
  auto* out = static_cast<__nv_bfloat16*>(p.out) + first;
  rms_norm_row(static_cast<const __nv_bfloat16*>(p.x) + first, p.weight, dim, p.eps,
               /*bf16_chain=*/false, row, [&](int i, float4 y) {
                 const auto low = [](float v) { return round_to<__nv_bfloat16>(v); };
                 const float4 v = make_float4(low(y.x), low(y.y), low(y.z), low(y.w));
                 store4(out + i, v);
                 store_operands(p, i, v);
               });
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void normalised_sm90(const NormalisedSm90Params& p, Stream stream) {
  if (p.rows == 0) return;
  if (p.dim % 128 != 0 || p.dim > 16384)
    throw_kernel_error("normalised_sm90", "rows of a multiple of 128 values, 16,384 at most");
  const auto bytes = static_cast<size_t>(p.dim * 4);
  cudaFuncSetAttribute(cuda::normalised_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
  cuda::launch_early(cuda::normalised_kernel,
                     {cuda::blocks_for(p.x_groups * 8, 1), cuda::kNormThreads, bytes}, stream,
                     "normalised_sm90", p);
}

}  // namespace hadal::ops
