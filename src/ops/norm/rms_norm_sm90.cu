// One block a row, held in shared memory; sixteen lanes add it in the order of the CPU's vectors.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/operand_rows.cuh"
#include "ops/cuda/rows.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/norm/rms_norm_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 256;

/// A row of zeros in the operands.
__device__ void clear_row(const NormOperandsSm90& to, int64_t row, int dim) {
  const float4 zero = make_float4(0, 0, 0, 0);
  for (int i = static_cast<int>(threadIdx.x) * 4; i < dim; i += kThreads * 4) {
    if (to.codes != nullptr) store_quantised(zero, row, i / 128, to.codes, to.scales, to.x_groups);
    if (to.operand != nullptr) store_low(zero, row, i, to.operand, to.x_groups);
  }
}

template <bool kOperands>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const __grid_constant__ RmsNormSm90Params p,
                    const __grid_constant__ NormOperandsSm90 to) {
  extern __shared__ __align__(16) float row[];
  __shared__ float shared_rstd;
  wait_for_previous();
  launch_dependents();
  const int t = static_cast<int>(threadIdx.x), dim = static_cast<int>(p.dim);
  if constexpr (kOperands) {
    if (blockIdx.x >= p.rows) return clear_row(to, blockIdx.x, dim);
  }
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
    if constexpr (kOperands) {
      const auto low = [](float v) { return round_to<__nv_bfloat16>(v); };
      const float4 v = make_float4(low(y.x), low(y.y), low(y.z), low(y.w));
      if (to.codes != nullptr)
        store_quantised(v, blockIdx.x, i / 128, to.codes, to.scales, to.x_groups);
      if (to.operand != nullptr) store_low(v, blockIdx.x, i, to.operand, to.x_groups);
    }
  }
}

template <bool kOperands>
void launch(const RmsNormSm90Params& p, const NormOperandsSm90& to, int64_t blocks, Stream stream) {
  if (p.rows == 0) return;
  if (!serves_rms_norm_sm90(p.dim) || (kOperands && p.dim % 128 != 0))
    throw_kernel_error("rms_norm_sm90", "rows of a multiple of 8 values, 16,384 at most");
  const auto bytes = static_cast<size_t>(p.dim * 4);
  auto* kernel = rms_norm_kernel<kOperands>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 65536);
  launch_early(kernel, {blocks_for(blocks, 1), kThreads, bytes}, stream, "rms_norm_sm90", p, to);
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void rms_norm_sm90(const RmsNormSm90Params& p, Stream stream) {
  cuda::launch<false>(p, {}, p.rows, stream);
}

void rms_norm_operands_sm90(const RmsNormSm90Params& p,
                            const NormOperandsSm90& operands,
                            Stream stream) {
  cuda::launch<true>(p, operands, operands.x_groups * 8, stream);
}

}  // namespace hadal::ops
