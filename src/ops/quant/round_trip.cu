// FP8 and FP4 round trips: 8, 16 or 32 lanes share a group of channels.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/quant/round_trip_kernels.h"

namespace hadal::ops {
namespace {

using cuda::as_stream;
using cuda::blocks_for;
using cuda::check_launch;
using cuda::load4;
using cuda::store4;

constexpr int kThreads = 256;

/// 2^ceil(log2 r) for positive normal r.
__device__ inline float power_of_two_above(float r) {
  const unsigned bits = __float_as_uint(r);
  return __uint_as_float(((bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u)) << 23);
}

/// Nearest multiple of a power of two, ties to even: the sum with 1.5 * 2^23 steps has no bits
/// below the step. `magnitude` is at most 448 (6); NaN stays NaN.
template <bool kFp4>
__device__ inline float round_magnitude(float magnitude) {
  float magic;
  if (kFp4) {
    magic = magnitude < 2.0f ? 6291456.0f : magnitude < 4.0f ? 12582912.0f : 25165824.0f;
  } else {
    // Steps of 2^(exponent - 3), which no longer shrink below 2^-6.
    unsigned exponent = __float_as_uint(magnitude) >> 23;
    exponent = exponent < 121u ? 121u : exponent;
    magic = __uint_as_float(((exponent + 20u) << 23) | 0x400000u);
  }
  return (magnitude + magic) - magic;
}

template <bool kFp4>
__device__ inline float round_value(float x, float scale, float inverse) {
  const float largest = kFp4 ? 6.0f : 448.0f;
  const float magnitude = fabsf(x) * inverse;
  const float bounded = magnitude > largest ? largest : magnitude;
  const float rounded = round_magnitude<kFp4>(bounded) * scale;
  return rounded == 0.0f ? 0.0f : copysignf(rounded, x);  // as the CPU's: no zero is negative
}

/// An item is a group of a row, or the row's channels beyond `dim`.
template <typename T, bool kFp4, int kLanes>
__global__ void __launch_bounds__(kThreads) round_groups(RoundTripParams p) {
  const int64_t groups = p.dim / p.group, per_row = groups + (p.dim < p.stride ? 1 : 0);
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const bool live = item < p.rows * per_row;
  const int64_t row = live ? item / per_row : 0, index = live ? item % per_row : 0;
  const int64_t first = index * p.group, begin = threadIdx.x % kLanes * 4;
  const int64_t end = !live ? 0 : index < groups ? p.group : p.stride - p.dim;
  const T* x = static_cast<const T*>(p.x) + row * p.stride + first;
  T* out = static_cast<T*>(p.out) + row * p.stride + first;
  float amax = 0.0f;
  for (int64_t c = begin; c < end; c += kLanes * 4) {
    const float4 v = load4(x + c);
    amax = fmaxf(fmaxf(amax, fmaxf(fabsf(v.x), fabsf(v.y))), fmaxf(fabsf(v.z), fabsf(v.w)));
  }
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(0xffffffffu, amax, offset));
  }
  const float floor = kFp4 ? 6.0f * __uint_as_float(1u << 23) : 1e-4f;
  const float scale = power_of_two_above(fmaxf(amax, floor) * (1.0f / (kFp4 ? 6.0f : 448.0f)));
  // Exact: the scale is a power of two from 2^-126 to 2^126.
  const float inverse = 1.0f / scale;
  for (int64_t c = begin; c < end; c += kLanes * 4) {
    float4 v = load4(x + c);
    if (index < groups) {
      v = make_float4(
          round_value<kFp4>(v.x, scale, inverse), round_value<kFp4>(v.y, scale, inverse),
          round_value<kFp4>(v.z, scale, inverse), round_value<kFp4>(v.w, scale, inverse));
    }
    store4(out + c, v);
  }
}

template <typename T, bool kFp4>
void launch_typed(const RoundTripParams& p, cudaStream_t stream) {
  const int64_t items = p.rows * (p.dim / p.group + (p.dim < p.stride ? 1 : 0));
  if (p.group == 32) {
    round_groups<T, kFp4, 8><<<blocks_for(items * 8, kThreads), kThreads, 0, stream>>>(p);
  } else if (p.group == 64) {
    round_groups<T, kFp4, 16><<<blocks_for(items * 16, kThreads), kThreads, 0, stream>>>(p);
  } else {
    round_groups<T, kFp4, 32><<<blocks_for(items * 32, kThreads), kThreads, 0, stream>>>(p);
  }
  check_launch(kFp4 ? "fp4_round_trip" : "fp8_round_trip");
}

template <typename T>
void launch_format(const RoundTripParams& p, cudaStream_t stream) {
  p.fp4 ? launch_typed<T, true>(p, stream) : launch_typed<T, false>(p, stream);
}

void launch(const RoundTripParams& p, Stream stream) {
  p.type == ElementType::kBf16 ? launch_format<__nv_bfloat16>(p, as_stream(stream))
                               : launch_format<float>(p, as_stream(stream));
}

const bool filled = round_trip_cuda.fill(launch);

}  // namespace
}  // namespace hadal::ops
