// Partial interleaved rotary embedding, one thread per pair of channels.
#include "ops/attention/rope_kernels.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/warp.cuh"

namespace hadal::ops {
namespace {

using cuda::as_stream;
using cuda::blocks_for;
using cuda::check_launch;
using cuda::from_float;
using cuda::to_float;

// reference: (even cos - odd sin, even sin + odd cos) on the last rope_dim channels
template <typename T>
__global__ void rotate(RopeParams p) {
  const int64_t half_dim = p.dim / 2, half_rope = p.rope_dim / 2;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= p.tokens * p.heads * half_dim) return;
  const int64_t row = index / half_dim;
  const int64_t pair = index - row * half_dim - (half_dim - half_rope);  // negative: not rotated
  const T* x = static_cast<const T*>(p.x) + index * 2;
  T* out = static_cast<T*>(p.out) + index * 2;
  if (pair < 0) {
    out[0] = x[0];
    out[1] = x[1];
    return;
  }
  const float* table = p.cos_sin + (row / p.heads * half_rope + pair) * 2;
  const float c = table[0], s = p.inverse ? -table[1] : table[1];
  const float even = to_float(x[0]), odd = to_float(x[1]);
  out[0] = from_float<T>(even * c - odd * s);
  out[1] = from_float<T>(even * s + odd * c);
}

void launch(const RopeParams& p, Stream stream) {
  const unsigned blocks = blocks_for(p.tokens * p.heads * (p.dim / 2), 256);
  if (p.type == ElementType::kBf16) {
    rotate<__nv_bfloat16><<<blocks, 256, 0, as_stream(stream)>>>(p);
  } else {
    rotate<float><<<blocks, 256, 0, as_stream(stream)>>>(p);
  }
  check_launch("rope");
}

const bool filled = rope_cuda.fill(launch);

}  // namespace
}  // namespace hadal::ops
