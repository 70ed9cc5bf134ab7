// Sums over a row with the bits of the CPU's (ops/cpu/vec.h): sixteen lanes, lane i takes the
// values i, i + 16, ... in order; then halves of 8, 4, 2 and 1 lanes are added.
#pragma once

#include "ops/cuda/launch.cuh"

namespace hadal::ops::cuda {

/// The sum over the sixteen lanes of each half of a warp, in every lane.
__device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
  for (int half = 8; half > 0; half /= 2) x = x + __shfl_xor_sync(0xffffffffu, x, half);
  return x;
}

}  // namespace hadal::ops::cuda
