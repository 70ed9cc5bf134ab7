// Functions of one value with the bits of the CPU's (ops/cpu/vec.h): the same operations in the
// same order, fused where fmaf says so and nowhere else (kernels are compiled with --fmad=false).
#pragma once

#include <cuda_runtime.h>

namespace hadal::ops::cuda {

/// exp(x) within two units in the last place; 0 below -87, exp(88) above 88.
__device__ __forceinline__ float exp_exact(float x) {
  const float clamped = fminf(fmaxf(x, -87.0f), 88.0f);
  const float n = rintf(clamped * 1.44269504088896341f);
  float r = fmaf(n, -0.693359375f, clamped);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  p = fmaf(p, r * r, r) + 1.0f;
  const float power = __int_as_float((static_cast<int>(n) + 127) << 23);  // n in [-126, 127]
  return x < -87.0f ? 0.0f : p * power;
}

__device__ __forceinline__ float sigmoid_exact(float x) {
  return 1.0f / (1.0f + exp_exact(0.0f - x));
}

/// weight * (g sigmoid(g) u) with g = min(gate, limit), u = up within -limit and limit.
__device__ __forceinline__ float swiglu_exact(float gate, float up, float weight, float limit) {
  const float g = fminf(gate, limit), u = fminf(fmaxf(up, -limit), limit);
  return weight * (g * sigmoid_exact(g) * u);
}

}  // namespace hadal::ops::cuda
