// Loads and stores of four elements, and reductions over a warp.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace hadal::ops::cuda {

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

/// Rounds to T and back.
template <typename T>
__device__ inline float round_to(float x) {
  return to_float(from_float<T>(x));
}

/// Four neighbouring elements; the address is a multiple of four elements.
__device__ inline float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
__device__ inline float4 load4(const __nv_bfloat16* p) {
  const uint2 bits = *reinterpret_cast<const uint2*>(p);
  return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                     __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
}
__device__ inline void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
__device__ inline void store4(__nv_bfloat16* p, float4 v) {
  __nv_bfloat16 r[4] = {__float2bfloat16_rn(v.x), __float2bfloat16_rn(v.y),
                        __float2bfloat16_rn(v.z), __float2bfloat16_rn(v.w)};
  uint2 bits;
  bits.x = static_cast<unsigned>(__bfloat16_as_ushort(r[0])) |
           (static_cast<unsigned>(__bfloat16_as_ushort(r[1])) << 16);
  bits.y = static_cast<unsigned>(__bfloat16_as_ushort(r[2])) |
           (static_cast<unsigned>(__bfloat16_as_ushort(r[3])) << 16);
  *reinterpret_cast<uint2*>(p) = bits;
}

__device__ inline float dot4(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

/// a x + y
__device__ inline float4 axpy4(float a, float4 x, float4 y) {
  return make_float4(fmaf(a, x.x, y.x), fmaf(a, x.y, y.y), fmaf(a, x.z, y.z), fmaf(a, x.w, y.w));
}

/// The sum (largest) over the 32 lanes, in every lane, in a fixed order.
__device__ inline float warp_sum(float x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ inline float warp_max(float x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  }
  return x;
}

}  // namespace hadal::ops::cuda
