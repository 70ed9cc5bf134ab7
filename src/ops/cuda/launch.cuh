// Launch helpers of the CUDA kernels.
#pragma once

#include <cuda_runtime.h>

#include "ops/kernel_types.h"

namespace hadal::ops::cuda {

/// After every launch: throws hadal::Error when the launch itself failed.
inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) throw_kernel_error(kernel, cudaGetErrorString(error));
}

inline cudaStream_t as_stream(Stream stream) { return static_cast<cudaStream_t>(stream); }

/// Blocks for `count` items of `per_block` each; counts beyond a grid's 2^31 - 1 are an error.
inline unsigned blocks_for(int64_t count, int64_t per_block) {
  const int64_t blocks = (count + per_block - 1) / per_block;
  if (blocks > 0x7fffffff) throw_kernel_error("launch", "the grid exceeds 2^31 - 1 blocks");
  return static_cast<unsigned>(blocks);
}

struct LaunchShape {
  dim3 grid;
  unsigned threads;
  size_t shared_bytes = 0;
  unsigned cluster = 1;  ///< blocks that run together and see each other's shared memory
};

/// Launches a kernel that may begin beside the one before it (sm90.cuh, wait_for_previous). Errors:
/// Error for a grid of more than 65,535 blocks in y or z, where tokens or rows of a long step lie.
template <typename... Params, typename... Args>
void launch_early(void (*kernel)(Params...),
                  const LaunchShape& shape,
                  Stream stream,
                  const char* name,
                  const Args&... args) {
  if (shape.grid.y > 65535 || shape.grid.z > 65535)
    throw_kernel_error(name, "more than 65,535 rows in one launch");
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.threads;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = as_stream(stream);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {shape.cluster, 1, 1};
  config.attrs = attributes;
  config.numAttrs = shape.cluster > 1 ? 2 : 1;
  cudaLaunchKernelEx(&config, kernel, args...);
  check_launch(name);
}

/// out[c] = sum over p in order of parts[p][c]: the second stage of a deterministic reduction.
static __global__ void sum_parts_kernel(const float* __restrict__ parts,
                                        float* __restrict__ out,
                                        int64_t num_parts,
                                        int64_t columns) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= columns) return;
  float sum = 0.0f;
  for (int64_t p = 0; p < num_parts; ++p) sum += parts[p * columns + c];
  out[c] = sum;
}

inline void sum_parts(
    const float* parts, float* out, int64_t num_parts, int64_t columns, cudaStream_t stream) {
  sum_parts_kernel<<<blocks_for(columns, 128), 128, 0, stream>>>(parts, out, num_parts, columns);
  check_launch("sum_parts");
}

}  // namespace hadal::ops::cuda
