// Functions of one value with the bits of the CPU's (ops/cpu/vec.h): the same operations in the
// same order, fused where fmaf says so and nowhere else (kernels are compiled with --fmad=false).
#pragma once

#include <cuda_runtime.h>

#include "ops/exact_math.h"

namespace hadal::ops::cuda {

__device__ __forceinline__ float sigmoid_exact(float x) {
  return 1.0f / (1.0f + exp_exact(0.0f - x));
}

/// weight * (g sigmoid(g) u) with g = min(gate, limit), u = up within -limit and limit.
__device__ __forceinline__ float swiglu_exact(float gate, float up, float weight, float limit) {
  const float g = fminf(gate, limit), u = fminf(fmaxf(up, -limit), limit);
  return weight * (g * sigmoid_exact(g) * u);
}

}  // namespace hadal::ops::cuda
