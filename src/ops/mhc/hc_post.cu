// hc_post forward and backward for four streams, one warp per token.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/mhc/hc_math.h"
#include "ops/mhc/hyper_connection_kernels.h"

namespace hadal::ops {
namespace {

using cuda::as_stream;
using cuda::axpy4;
using cuda::blocks_for;
using cuda::check_launch;
using cuda::dot4;
using cuda::load4;
using cuda::store4;
using cuda::warp_sum;
using hc::kCells;
using hc::kStreams;

constexpr int kWarps = 8, kThreads = kWarps * 32;

__device__ inline float4 scale4(float a, float4 x) {
  return make_float4(a * x.x, a * x.y, a * x.z, a * x.w);
}

struct Weights {
  float post[kStreams], comb[kCells];
};

__device__ inline Weights load_weights(const float* post, const float* comb, int64_t token) {
  Weights w;
  for (int k = 0; k < kStreams; ++k) w.post[k] = post[token * kStreams + k];
  for (int i = 0; i < kCells; ++i) w.comb[i] = comb[token * kCells + i];
  return w;
}

/// new[k] = post[k] out + sum_j comb[j, k] X_j
template <typename T>
__global__ void __launch_bounds__(kThreads) forward(HcPostParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (token >= p.tokens) return;
  const Weights w = load_weights(p.post, p.comb, token);
  const T* out = static_cast<const T*>(p.out) + token * p.dim;
  const T* streams = static_cast<const T*>(p.streams) + token * kStreams * p.dim;
  T* result = static_cast<T*>(p.result) + token * kStreams * p.dim;
  for (int64_t c = threadIdx.x % 32 * 4; c < p.dim; c += 128) {
    float4 x[kStreams];
    for (int j = 0; j < kStreams; ++j) x[j] = load4(streams + j * p.dim + c);
    const float4 f = load4(out + c);
    for (int k = 0; k < kStreams; ++k) {
      float4 carried = scale4(w.comb[k], x[0]);
      for (int j = 1; j < kStreams; ++j) carried = axpy4(w.comb[j * kStreams + k], x[j], carried);
      store4(result + k * p.dim + c, axpy4(w.post[k], f, carried));
    }
  }
}

/// With G = d_result: d_out = sum_k post[k] G_k, dX_j = sum_k comb[j, k] G_k, d_post[k] = out .
/// G_k, d_comb[j, k] = X_j . G_k.
template <typename T>
__global__ void __launch_bounds__(kThreads) backward(HcPostBackwardParams p) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (token >= p.tokens) return;
  const Weights w = load_weights(p.post, p.comb, token);
  const int64_t base = token * kStreams * p.dim;
  const T* out = static_cast<const T*>(p.out) + token * p.dim;
  const T* streams = static_cast<const T*>(p.streams) + base;
  const T* d_result = static_cast<const T*>(p.d_result) + base;
  T* d_out = static_cast<T*>(p.d_out) + token * p.dim;
  T* d_streams = static_cast<T*>(p.d_streams) + base;
  float d_post[kStreams] = {}, d_comb[kCells] = {};
  for (int64_t c = lane * 4; c < p.dim; c += 128) {
    float4 g[kStreams];
    for (int k = 0; k < kStreams; ++k) g[k] = load4(d_result + k * p.dim + c);
    const float4 f = load4(out + c);
    float4 sum = scale4(w.post[0], g[0]);
    for (int k = 1; k < kStreams; ++k) sum = axpy4(w.post[k], g[k], sum);
    store4(d_out + c, sum);
    for (int k = 0; k < kStreams; ++k) d_post[k] = dot4(f, g[k], d_post[k]);
    for (int j = 0; j < kStreams; ++j) {
      const float4 x = load4(streams + j * p.dim + c);
      float4 dx = scale4(w.comb[j * kStreams], g[0]);
      for (int k = 1; k < kStreams; ++k) dx = axpy4(w.comb[j * kStreams + k], g[k], dx);
      store4(d_streams + j * p.dim + c, dx);
      for (int k = 0; k < kStreams; ++k) {
        d_comb[j * kStreams + k] = dot4(x, g[k], d_comb[j * kStreams + k]);
      }
    }
  }
  for (int k = 0; k < kStreams; ++k) {
    const float sum = warp_sum(d_post[k]);
    if (lane == 0) p.d_post[token * kStreams + k] = sum;
  }
  for (int i = 0; i < kCells; ++i) {
    const float sum = warp_sum(d_comb[i]);
    if (lane == 0) p.d_comb[token * kCells + i] = sum;
  }
}

void launch(const HcPostParams& p, Stream stream) {
  const unsigned blocks = blocks_for(p.tokens, kWarps);
  if (p.type == ElementType::kBf16) {
    forward<__nv_bfloat16><<<blocks, kThreads, 0, as_stream(stream)>>>(p);
  } else {
    forward<float><<<blocks, kThreads, 0, as_stream(stream)>>>(p);
  }
  check_launch("hc_post");
}
void launch_grad(const HcPostBackwardParams& p, Stream stream) {
  const unsigned blocks = blocks_for(p.tokens, kWarps);
  if (p.type == ElementType::kBf16) {
    backward<__nv_bfloat16><<<blocks, kThreads, 0, as_stream(stream)>>>(p);
  } else {
    backward<float><<<blocks, kThreads, 0, as_stream(stream)>>>(p);
  }
  check_launch("hc_post backward");
}

const bool filled = hc_post_cuda.fill(launch) && hc_post_backward_cuda.fill(launch_grad);

}  // namespace
}  // namespace hadal::ops
