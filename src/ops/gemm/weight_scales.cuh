// Scales of E4M3 weights on their way to the sums of a block.
#pragma once

#include "ops/cuda/sm90.cuh"
#include "ops/gemm/linear_sm90.h"

namespace hadal::ops::cuda {

/// The scales of a block's outputs, slab by slab. Read one by one they would come from far each
/// time, so those of a part of K of at most kNear slabs are brought before anybody needs them.
struct WeightScales {
  static constexpr int kNear = 256;
  const float* far;   ///< of the part's first slab
  int64_t stride;     ///< from slab to slab
  const float* near;  ///< in shared memory, or null

  /// By `threads` threads, which meet at barrier 1.
  __device__ WeightScales(const LinearSm90Params& p,
                          int64_t w_row,
                          int64_t begin,
                          int64_t end,
                          float* memory,
                          int threads)
      : far(p.w_scale + begin * ((p.outputs + 127) / 128) + w_row / 128),
        stride((p.outputs + 127) / 128),
        near(end - begin <= kNear ? memory : nullptr) {
    if (near == nullptr) return;
    for (int i = static_cast<int>(threadIdx.x); i < end - begin; i += threads)
      memory[i] = __ldg(far + i * stride);
    named_barrier_wait(1, threads);
  }
  __device__ __forceinline__ float of(int64_t slab) const {
    return near != nullptr ? near[slab] : __ldg(far + slab * stride);
  }
};

}  // namespace hadal::ops::cuda
