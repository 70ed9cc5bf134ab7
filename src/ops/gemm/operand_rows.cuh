// Values of a row on their way into the operands of the products (ops/gemm/sm90_layout.h).
#pragma once

#include <cuda_fp8.h>

#include "ops/cuda/rows.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::cuda {

/// 2^ceil(log2(largest / 448)), the scale of Q8_128.
__device__ __forceinline__ uint32_t scale_bits(float largest) {
  const uint32_t r = __float_as_uint(fmaxf(largest, 1e-4f) * (1.0f / 448.0f));
  return ((r >> 23) + ((r & 0x7fffffu) != 0 ? 1u : 0u)) << 23;
}

/// Four channels of a row's 128 (lane * 4 on) to E4M3 at their place in the operand; a warp has
/// all.
__device__ __forceinline__ void store_quantised(
    float4 v, int64_t row, int64_t slab, uint8_t* codes, float* scales, int64_t x_groups) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const float largest =
      warp_max(fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
  const uint32_t bits = scale_bits(largest);
  // Dividing by a power of two is multiplying by its inverse.
  const float inverse = __uint_as_float((254u << 23) - bits);
  const auto code = [&](float x) {
    return static_cast<uint32_t>(__nv_cvt_float_to_fp8(x * inverse, __NV_SATFINITE, __NV_E4M3));
  };
  const uint32_t word = code(v.x) | code(v.y) << 8 | code(v.z) << 16 | code(v.w) << 24;
  *reinterpret_cast<uint32_t*>(codes + sm90::operand_offset(row, slab * 128 + lane * 4, x_groups)) =
      word;
  if (lane == 0) scales[slab * x_groups * 8 + row] = __uint_as_float(bits);
}

/// Four channels from `channel` on, as BF16 at their place in the operand.
__device__ __forceinline__ void store_low(
    float4 v, int64_t row, int64_t channel, uint8_t* operand, int64_t x_groups) {
  store4(
      reinterpret_cast<__nv_bfloat16*>(operand + sm90::operand_offset(row, channel * 2, x_groups)),
      v);
}

}  // namespace hadal::ops::cuda
