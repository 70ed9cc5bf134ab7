// Sums over the threads of a block.
#pragma once

#include <cuda_runtime.h>

namespace hadal::ops::cuda {

/// Sum of `value` over the threads before this one; `warps` has a place for each warp.
__device__ __forceinline__ int sum_before(int value, int* warps) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = 0;
  for (int i = 0; i < warp; ++i) before += warps[i];
  __syncthreads();
  return before + sum - value;
}

}  // namespace hadal::ops::cuda
