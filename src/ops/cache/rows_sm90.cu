// Half a warp a row, which stays in registers from its load to its packed bytes.
#include <cuda_fp8.h>

#include "ops/cache/rows_sm90.h"
#include "ops/cuda/half_rows.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"

namespace hadal::ops::cuda {
namespace {

constexpr int kRotary = static_cast<int>(kRotaryDim);

/// 2^exponent for an exponent of a normal number.
__device__ __forceinline__ float power_of_two(int exponent) {
  return __int_as_float((exponent + 127) << 23);
}
/// 2^ceil(log2 r) for positive normal r.
__device__ __forceinline__ float power_above(float r) {
  const uint32_t bits = __float_as_uint(r);
  return __uint_as_float(((bits >> 23) + ((bits & 0x7fffffu) != 0 ? 1u : 0u)) << 23);
}
/// 1 / scale for a power of two whose inverse is normal.
__device__ __forceinline__ float inverse_power(float scale) {
  return __uint_as_float((254u << 23) - __float_as_uint(scale));
}
/// k of the scale 2^k = 2^ceil(log2(largest / 448)) that a packed row keeps; 0 for a group of
/// zeros.
__device__ __forceinline__ int scale_exponent(float largest) {
  if (largest == 0.0f) return 0;
  const uint32_t bits = __float_as_uint(largest);
  return static_cast<int>(bits >> 23) - 127 - 8 + ((bits & 0x7fffffu) > 0x600000u ? 1 : 0);
}

template <int kPer>
__device__ __forceinline__ float largest_of(const float (&v)[kPer], float floor) {
#pragma unroll
  for (int j = 0; j < kPer; ++j) floor = fmaxf(floor, fabsf(v[j]));
  return floor;
}

/// Q8 of groups of kLanes lanes, in place; returns the exponent of the packed scale.
template <int kLanes, int kPer>
__device__ __forceinline__ int round_e4m3(float (&v)[kPer]) {
  const float scale = power_above(max_of_lanes<kLanes>(largest_of(v, 1e-4f)) * (1.0f / 448.0f));
  const float inverse = inverse_power(scale);
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const float rounded = static_cast<float>(__nv_fp8_e4m3(v[j] * inverse)) * scale;
    v[j] = rounded == 0.0f ? 0.0f : rounded;  // as the CPU's: no zero is negative
  }
  return scale_exponent(max_of_lanes<kLanes>(largest_of(v, 0.0f)));
}

/// Q4 of groups of kLanes lanes: E2M1 codes, which leave no zero negative, and the byte of their
/// packed scale. A value times 2^-126 over its scale has its code in the bits of FP32, subnormal
/// ones too, and rounding to nearest even there is rounding to the grid.
template <int kLanes, int kPer>
__device__ __forceinline__ int round_e2m1(const float (&v)[kPer], uint32_t (&codes)[kPer]) {
  constexpr float kFloor = 6.0f * 1.17549435e-38f;
  const float scale = power_above(max_of_lanes<kLanes>(largest_of(v, kFloor)) * (1.0f / 6.0f));
  const float inverse = inverse_power(scale);
  uint32_t largest = 0;
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const uint32_t bits = __float_as_uint(fabsf(v[j]) * inverse * 1.17549435e-38f);
    codes[j] = (bits + 0x1fffffu + (bits >> 22 & 1)) >> 22;
    largest = max(largest, codes[j]);
  }
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2)
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  const int field = static_cast<int>(__float_as_uint(scale) >> 23);
  // The largest of a group may have become 3: half the scale then holds twice the values.
  const bool halve = largest < 6 && field > 1;
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    if (codes[j] == 0) continue;
    if (halve) codes[j] += codes[j] == 1 ? 1 : 2;
    codes[j] |= __float_as_uint(v[j]) >> 31 << 3;
  }
  return largest == 0 ? 127 : field - halve;
}

template <int kPer>
__global__ void __launch_bounds__(kHalfRowThreads)
    latent_rows_kernel(const __grid_constant__ LatentRowsSm90Params p) {
  constexpr int kRounded = kPer * 16 - kRotary, kRoundedLanes = kRounded / kPer;
  constexpr int kGroupLanes = 64 / kPer;
  constexpr int kScales = kRounded + 2 * kRotary, kEnd = kScales + kRounded / 64;
  constexpr int kBytes = (kEnd + 7) / 8 * 8;
  const int64_t row = row_of_half(), from = min(row, p.rows - 1);
  const int lane = lane_of_half();
  if (p.weight != nullptr) prefetch_constant(p.weight + lane * kPer);
  wait_for_previous();
  launch_dependents();
  const uint16_t* x = p.x + from * p.stride;
  float v[kPer];
  load_piece(v, x);
  if (p.weight != nullptr) normalise_piece(v, x, p.weight, p.eps);
  if (p.cos_sin != nullptr) rotate_piece<kRotary>(v, p.cos_sin + from * kRotary);
  const int64_t place = p.place != nullptr ? p.place[from] : from;
  const bool stored = row < p.rows && place >= 0;
  uint8_t* out = p.out + place * kBytes;
  if (stored && lane >= kRoundedLanes) {
    auto* rotary = reinterpret_cast<__nv_bfloat16*>(out + kRounded) + (lane - kRoundedLanes) * kPer;
#pragma unroll
    for (int j = 0; j < kPer; j += 4)
      store4(rotary + j, make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]));
  }
  if constexpr (kRounded > 0) {
    const int exponent = round_e4m3<kGroupLanes>(v);
    if (!stored) return;
    if (lane < kBytes - kEnd) out[kEnd + lane] = 0;
    if (lane >= kRoundedLanes) return;
    const float inverse = power_of_two(-exponent);
#pragma unroll
    for (int j = 0; j < kPer; j += 8) {
      uint32_t words[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const uint32_t pair = __nv_cvt_float2_to_fp8x2(
            make_float2(v[j + i] * inverse, v[j + i + 1] * inverse), __NV_SATFINITE, __NV_E4M3);
        words[i / 4] |= pair << (i % 4 * 8);
      }
      *reinterpret_cast<uint2*>(out + lane * kPer + j) = make_uint2(words[0], words[1]);
    }
    if (lane % kGroupLanes == 0)
      out[kScales + lane / kGroupLanes] = static_cast<uint8_t>(exponent + 127);
  }
}

/// The same of rows of kGroups * 64 channels for any number of groups: a lane holds four channels
/// of each, so that groups are the half warp's.
template <int kGroups>
__global__ void __launch_bounds__(kHalfRowThreads)
    latent_groups_kernel(const __grid_constant__ LatentRowsSm90Params p) {
  constexpr int kRounded = (kGroups - 1) * 64, kScales = kRounded + 2 * kRotary;
  constexpr int kEnd = kScales + kGroups - 1, kBytes = (kEnd + 7) / 8 * 8;
  const int64_t row = row_of_half(), from = min(row, p.rows - 1);
  const int lane = lane_of_half();
  if (p.weight != nullptr) prefetch_constant(p.weight + lane * (kGroups * 4));
  wait_for_previous();
  launch_dependents();
  const uint16_t* x = p.x + from * p.stride;
  float root = 1.0f;
  if (p.weight != nullptr) {
    float dealt[kGroups * 4];
    load_dealt(dealt, x);
    root = inverse_root<false>(dealt, p.eps);
  }
  const int64_t place = p.place != nullptr ? p.place[from] : from;
  const bool stored = row < p.rows && place >= 0;
  uint8_t* out = p.out + place * kBytes;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    const int first = group * 64 + lane * 4;
    const float4 four = load4(reinterpret_cast<const __nv_bfloat16*>(x) + first);
    float v[4] = {four.x, four.y, four.z, four.w};
    if (p.weight != nullptr) {
#pragma unroll
      for (int j = 0; j < 4; ++j)
        v[j] = round_to<__nv_bfloat16>(p.weight[first + j] * (v[j] * root));
    }
    if (group + 1 == kGroups) {
      if (p.cos_sin != nullptr) {
        const auto* turns = reinterpret_cast<const float2*>(p.cos_sin + from * kRotary) + lane * 2;
        rotate_pair(v[0], v[1], turns[0]);
        rotate_pair(v[2], v[3], turns[1]);
      }
      if (!stored) continue;
      store4(reinterpret_cast<__nv_bfloat16*>(out + kRounded) + lane * 4,
             make_float4(v[0], v[1], v[2], v[3]));
      if (lane < kBytes - kEnd) out[kEnd + lane] = 0;
      continue;
    }
    const int exponent = round_e4m3<16>(v);
    if (!stored) continue;
    const float inverse = power_of_two(-exponent);
    uint32_t word = 0;
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const uint32_t pair = __nv_cvt_float2_to_fp8x2(
          make_float2(v[j] * inverse, v[j + 1] * inverse), __NV_SATFINITE, __NV_E4M3);
      word |= pair << (j * 8);
    }
    *reinterpret_cast<uint32_t*>(out + first) = word;
    if (lane == 0) out[kScales + group] = static_cast<uint8_t>(exponent + 127);
  }
}

/// The kernel of a width whose groups of 64 do not end where a lane's piece of a row ends; null
/// for the others.
void (*groups_kernel(int64_t width))(LatentRowsSm90Params) {
  switch (width) {
    case 192:
      return latent_groups_kernel<3>;
    case 320:
      return latent_groups_kernel<5>;
    case 384:
      return latent_groups_kernel<6>;
    case 448:
      return latent_groups_kernel<7>;
    default:
      return nullptr;
  }
}

/// H x of 128 values in pieces of 8.
__device__ __forceinline__ void hadamard_piece(float (&v)[8]) {
#pragma unroll
  for (int stride = 1; stride < 8; stride *= 2) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if ((j & stride) != 0) continue;
      const float a = v[j], b = v[j + stride];
      v[j] = a + b;
      v[j + stride] = a - b;
    }
  }
#pragma unroll
  for (int step = 1; step < 16; step *= 2) {
    const float sign = (lane_of_half() & step) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int j = 0; j < 8; ++j)
      v[j] = fmaf(v[j], sign, __shfl_xor_sync(0xffffffffu, v[j], step));  // other + own, - own
  }
}

__global__ void __launch_bounds__(kHalfRowThreads)
    index_rows_kernel(const __grid_constant__ IndexRowsSm90Params p) {
  constexpr int kPer = 8, kBytes = 68;
  const int64_t row = row_of_half(), from = min(row, p.rows - 1);
  const int lane = lane_of_half();
  if (p.weight != nullptr) prefetch_constant(p.weight + lane * kPer);
  wait_for_previous();
  launch_dependents();
  const uint16_t* x = p.x + from * kPer * 16;
  float v[kPer];
  load_piece(v, x);
  if (p.weight != nullptr) normalise_piece(v, x, p.weight, p.eps);
  if (p.cos_sin != nullptr) {
    rotate_piece<kRotary>(v, p.cos_sin + from / p.heads * kRotary);
    hadamard_piece(v);
    constexpr float kFactor = 0.08838834764831845f;  // 1 / sqrt(128)
#pragma unroll
    for (int j = 0; j < kPer; ++j) v[j] = round_to<__nv_bfloat16>(v[j] * kFactor);
  }
  uint32_t codes[kPer];
  const int scale = round_e2m1<4>(v, codes);
  const int64_t place = p.place != nullptr ? p.place[from] : from;
  if (row >= p.rows || place < 0) return;
  uint8_t* out = p.out + place * kBytes;
  uint32_t word = 0;
#pragma unroll
  for (int j = 0; j < kPer; ++j) word |= codes[j] << (4 * j);
  *reinterpret_cast<uint32_t*>(out + lane * 4) = word;
  if (lane % 4 == 0) out[64 + lane / 4] = static_cast<uint8_t>(scale);
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void latent_rows_sm90(const LatentRowsSm90Params& p, Stream stream) {
  if (p.rows == 0) return;
  if (p.stride % 4 != 0) throw_kernel_error("latent_rows_sm90", "rows at a multiple of 4 values");
  if (auto* kernel = cuda::groups_kernel(p.width)) {
    cuda::launch_early(kernel, cuda::half_row_shape(p.rows), stream, "latent_rows_sm90", p);
    return;
  }
  cuda::by_width(p.width, "latent_rows_sm90", [&](auto per) {
    cuda::launch_early(cuda::latent_rows_kernel<per>, cuda::half_row_shape(p.rows), stream,
                       "latent_rows_sm90", p);
  });
}

void index_rows_sm90(const IndexRowsSm90Params& p, Stream stream) {
  if (p.rows == 0) return;
  cuda::launch_early(cuda::index_rows_kernel, cuda::half_row_shape(p.rows), stream,
                     "index_rows_sm90", p);
}

}  // namespace hadal::ops
