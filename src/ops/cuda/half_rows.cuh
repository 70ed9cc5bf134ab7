// Rows held by half a warp each. Dealt out, lane i of sixteen holds the values i, i + 16, ...,
// which is how the CPU's vectors hold them (ops/cpu/vec.h), so that sums over a row have their
// bits; in pieces, it holds neighbours, so that pairs and groups are its own.
#pragma once

#include <type_traits>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/rows.cuh"
#include "ops/cuda/warp.cuh"

namespace hadal::ops::cuda {

inline constexpr int kHalfRowThreads = 128, kHalfRows = kHalfRowThreads / 16;

inline LaunchShape half_row_shape(int64_t rows) {
  return {blocks_for(rows, kHalfRows), kHalfRowThreads};
}
/// The row of this half warp. Lanes behind the last row take part, since they share a warp with it.
__device__ __forceinline__ int64_t row_of_half() {
  return static_cast<int64_t>(blockIdx.x) * kHalfRows + threadIdx.x / 16;
}
__device__ __forceinline__ int lane_of_half() { return static_cast<int>(threadIdx.x) % 16; }

__device__ __forceinline__ uint16_t bf16_bits(float x) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(x));
}

/// 16 kPer BF16 values, dealt out.
template <int kPer>
__device__ __forceinline__ void load_dealt(float (&v)[kPer], const uint16_t* row) {
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    v[j] = __uint_as_float(static_cast<uint32_t>(row[j * 16 + lane_of_half()]) << 16);
}
template <int kPer>
__device__ __forceinline__ void store_dealt(const float (&v)[kPer], uint16_t* row) {
#pragma unroll
  for (int j = 0; j < kPer; ++j) row[j * 16 + lane_of_half()] = bf16_bits(v[j]);
}

/// 16 kPer BF16 values in pieces of kPer.
template <int kPer>
__device__ __forceinline__ void load_piece(float (&v)[kPer], const uint16_t* row) {
  const auto* piece = reinterpret_cast<const __nv_bfloat16*>(row) + lane_of_half() * kPer;
#pragma unroll
  for (int j = 0; j < kPer; j += 4) {
    const float4 four = load4(piece + j);
    v[j] = four.x, v[j + 1] = four.y, v[j + 2] = four.z, v[j + 3] = four.w;
  }
}

/// 1 / sqrt(mean of squares + eps) of a row dealt out (rms_norm_cpu.h). kChain: every intermediate
/// rounded to BF16.
template <bool kChain, int kPer>
__device__ __forceinline__ float inverse_root(const float (&dealt)[kPer], float eps) {
  const auto round = [](float x) { return kChain ? round_to<__nv_bfloat16>(x) : x; };
  float squares = 0.0f;
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    squares = kChain ? squares + round(dealt[j] * dealt[j]) : fmaf(dealt[j], dealt[j], squares);
  const float mean = round(sum_of_lanes(squares) / static_cast<float>(kPer * 16));
  return round(1.0f / sqrtf(round(mean + eps)));
}

/// RMSNorm of pieces of a row in memory, rounded to BF16.
template <int kPer>
__device__ __forceinline__ void normalise_piece(float (&v)[kPer],
                                                const uint16_t* row,
                                                const float* weight,
                                                float eps) {
  float dealt[kPer];
  load_dealt(dealt, row);
  const float root = inverse_root<false>(dealt, eps);
#pragma unroll
  for (int j = 0; j < kPer; ++j)
    v[j] = round_to<__nv_bfloat16>(weight[lane_of_half() * kPer + j] * (v[j] * root));
}

/// Rotates a pair (rope_cpu.h): products and their sum are rounded one by one, then to BF16.
__device__ __forceinline__ void rotate_pair(float& even, float& odd, float2 turn) {
  const float a = even * turn.x - odd * turn.y, b = even * turn.y + odd * turn.x;
  even = round_to<__nv_bfloat16>(a);
  odd = round_to<__nv_bfloat16>(b);
}

/// The last kRotary values of a row in pieces; cos_sin: [kRotary / 2, 2].
template <int kRotary, int kPer>
__device__ __forceinline__ void rotate_piece(float (&v)[kPer], const float* cos_sin) {
  constexpr int kFirst = 16 - kRotary / kPer;
  if (lane_of_half() < kFirst) return;
  const auto* turns =
      reinterpret_cast<const float2*>(cos_sin) + (lane_of_half() - kFirst) * (kPer / 2);
#pragma unroll
  for (int j = 0; j < kPer; j += 2) rotate_pair(v[j], v[j + 1], turns[j / 2]);
}

/// The same of a row dealt out; sign: -1 for the inverse.
template <int kRotary, int kPer>
__device__ __forceinline__ void rotate_dealt(float (&v)[kPer], const float* cos_sin, float sign) {
  const bool odd = lane_of_half() % 2 != 0;
#pragma unroll
  for (int j = 0; j < kRotary / 16; ++j) {
    const float2 turn = reinterpret_cast<const float2*>(cos_sin)[j * 8 + lane_of_half() / 2];
    float& own = v[kPer - kRotary / 16 + j];
    const float other = __shfl_xor_sync(0xffffffffu, own, 1), sine = turn.y * sign;
    own = round_to<__nv_bfloat16>(odd ? other * sine + own * turn.x : own * turn.x - other * sine);
  }
}

/// The largest over each kLanes neighbouring lanes, in all of them.
template <int kLanes>
__device__ __forceinline__ float max_of_lanes(float x) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}

/// Calls launch with the values a lane holds.
template <typename Launch>
void by_width(int64_t width, const char* kernel, Launch launch) {
  switch (width) {
    case 64:
      return launch(std::integral_constant<int, 4>());
    case 128:
      return launch(std::integral_constant<int, 8>());
    case 256:
      return launch(std::integral_constant<int, 16>());
    case 512:
      return launch(std::integral_constant<int, 32>());
    default:
      throw_kernel_error(kernel, "rows of 64, 128, 256 or 512 channels");
  }
}

}  // namespace hadal::ops::cuda
