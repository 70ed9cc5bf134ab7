// RMSNorm of a row by one block, which holds it in shared memory; sixteen lanes add it in the order
// of the CPU's vectors (ops/norm/rms_norm_sm90.h).
#pragma once

#include "ops/cuda/rows.cuh"
#include "ops/cuda/warp.cuh"

namespace hadal::ops::cuda {

inline constexpr int kNormThreads = 256;

/// Calls store(i, four results from channel i on) for a row of `dim` values; a warp has 128
/// neighbours at a time. `row`: memory for dim floats. kChain: every intermediate rounded to BF16.
template <typename Store>
__device__ __forceinline__ void rms_norm_row(const __nv_bfloat16* x,
                                             const float* weight,
                                             int dim,
                                             float eps,
                                             bool bf16_chain,
                                             float* row,
                                             Store store) {
  __shared__ float shared_rstd;
  const int t = static_cast<int>(threadIdx.x);
  for (int i = t * 4; i < dim; i += kNormThreads * 4) store4(row + i, load4(x + i));
  __syncthreads();
  if (t < 32) {
    const int lane = t % 16;
    float squares = 0.0f;
    if (bf16_chain) {
#pragma unroll 32
      for (int i = lane; i < dim; i += 16)
        squares = squares + round_to<__nv_bfloat16>(row[i] * row[i]);
    } else {
#pragma unroll 32
      for (int i = lane; i < dim; i += 16) squares = fmaf(row[i], row[i], squares);
    }
    const float sum = sum_of_lanes(squares);
    const auto round = [&](float v) { return bf16_chain ? round_to<__nv_bfloat16>(v) : v; };
    const float mean = round(sum / static_cast<float>(dim));
    if (t == 0) shared_rstd = round(1.0f / sqrtf(round(mean + eps)));
  }
  __syncthreads();
  const float rstd = shared_rstd;
  for (int i = t * 4; i < dim; i += kNormThreads * 4) {
    float4 y = load4(row + i);
    y = make_float4(y.x * rstd, y.y * rstd, y.z * rstd, y.w * rstd);
    if (weight != nullptr) {
      const float4 w = load4(weight + i);
      y = make_float4(w.x * y.x, w.y * y.y, w.z * y.z, w.w * y.w);
    }
    store(i, y);
  }
}

}  // namespace hadal::ops::cuda
