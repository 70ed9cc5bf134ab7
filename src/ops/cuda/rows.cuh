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

/// Launches a kernel that may begin beside the one before it (sm90.cuh, wait_for_previous), in
/// clusters of `cluster` blocks.
template <typename Params>
void launch_early(void (*kernel)(Params),
                  const Params& p,
                  dim3 grid,
                  unsigned threads,
                  size_t shared_bytes,
                  Stream stream,
                  const char* name,
                  unsigned cluster = 1) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = as_stream(stream);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {cluster, 1, 1};
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, p);
  check_launch(name);
}

}  // namespace hadal::ops::cuda
