// The matrix of a token that carries its streams past a sub-layer, by sixteen lanes with a cell
// each.
#pragma once

#include "ops/cuda/elementwise.cuh"

namespace hadal::ops::cuda {

inline constexpr int kStreams = 4, kCells = 16;

/// Divides each line of the 4 x 4 matrix of sixteen lanes by its sum + eps: columns, or rows.
template <bool kColumns>
__device__ __forceinline__ float normalise(float cell, int lane, float eps) {
  const int line = kColumns ? lane % 4 : lane / 4 * 4, step = kColumns ? 4 : 1;
  float total = __shfl_sync(0xffffffffu, cell, line, 16);
#pragma unroll
  for (int k = 1; k < 4; ++k) total = total + __shfl_sync(0xffffffffu, cell, line + k * step, 16);
  total = total + eps;
  return cell / total;
}

/// softmax over rows + eps, columns, then iters - 1 times rows and columns.
__device__ __forceinline__ float sinkhorn(float cell, int lane, int iters, float eps) {
  const int row = lane / 4 * 4;
  float highest = __shfl_sync(0xffffffffu, cell, row, 16);
#pragma unroll
  for (int k = 1; k < 4; ++k) {
    const float other = __shfl_sync(0xffffffffu, cell, row + k, 16);
    highest = other > highest ? other : highest;
  }
  const float e = exp_exact(cell - highest);
  float total = __shfl_sync(0xffffffffu, e, row, 16);
#pragma unroll
  for (int k = 1; k < 4; ++k) total = total + __shfl_sync(0xffffffffu, e, row + k, 16);
  cell = normalise<true>(e / total + eps, lane, eps);
  for (int i = 1; i < iters; ++i) {
    cell = normalise<false>(cell, lane, eps);
    cell = normalise<true>(cell, lane, eps);
  }
  return cell;
}

}  // namespace hadal::ops::cuda
