// Clamped SwiGLU forward and backward, one warp per row.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/moe/swiglu_kernels.h"

namespace hadal::ops {
namespace {

using cuda::as_stream;
using cuda::blocks_for;
using cuda::check_launch;
using cuda::load4;
using cuda::store4;
using cuda::warp_sum;
constexpr int kWarps = 8;

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// reference: g = min(gate, limit), u = clamp(up, -limit, limit), h = weight * (g sigmoid(g) u)
__device__ float forward_one(float gate, float up, float weight, float limit) {
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : (up < -limit ? -limit : up);
  return weight * (g * sigmoid(g) * u);
}

template <typename T>
__global__ void forward(SwigluParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const T* gate = static_cast<const T*>(p.gate) + row * p.inter;
  const T* up = static_cast<const T*>(p.up) + row * p.inter;
  T* out = static_cast<T*>(p.out) + row * p.inter;
  const float w = p.weight != nullptr ? p.weight[row] : 1.0f;
  for (int64_t i = lane * 4; i < p.inter; i += 128) {
    const float4 g = load4(gate + i), u = load4(up + i);
    store4(out + i,
           make_float4(forward_one(g.x, u.x, w, p.limit), forward_one(g.y, u.y, w, p.limit),
                       forward_one(g.z, u.z, w, p.limit), forward_one(g.w, u.w, w, p.limit)));
  }
}

struct Gradient {
  float gate, up, weight;
};

// Gradients of one element; a clamp passes the gradient on its bound and stops it beyond.
__device__ Gradient backward_one(float gate, float up, float weight, float grad, float limit) {
  const float g = gate > limit ? limit : gate;
  const float u = up > limit ? limit : (up < -limit ? -limit : up);
  const float s = sigmoid(g);
  const float h = g * s;
  const float d = grad * weight;
  Gradient result;
  result.gate = gate > limit ? 0.0f : d * u * (s + h * (1.0f - s));
  result.up = (up > limit || up < -limit) ? 0.0f : d * h;
  result.weight = grad * h * u;
  return result;
}

template <typename T>
__global__ void backward(SwigluBackwardParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const T* gate = static_cast<const T*>(p.gate) + row * p.inter;
  const T* up = static_cast<const T*>(p.up) + row * p.inter;
  const T* grad_out = static_cast<const T*>(p.grad_out) + row * p.inter;
  T* grad_gate = static_cast<T*>(p.grad_gate) + row * p.inter;
  T* grad_up = static_cast<T*>(p.grad_up) + row * p.inter;
  const float w = p.weight != nullptr ? p.weight[row] : 1.0f;
  float sum = 0.0f;
  for (int64_t i = lane * 4; i < p.inter; i += 128) {
    const float4 g = load4(gate + i), u = load4(up + i), d = load4(grad_out + i);
    const Gradient a = backward_one(g.x, u.x, w, d.x, p.limit);
    const Gradient b = backward_one(g.y, u.y, w, d.y, p.limit);
    const Gradient c = backward_one(g.z, u.z, w, d.z, p.limit);
    const Gradient e = backward_one(g.w, u.w, w, d.w, p.limit);
    store4(grad_gate + i, make_float4(a.gate, b.gate, c.gate, e.gate));
    store4(grad_up + i, make_float4(a.up, b.up, c.up, e.up));
    sum += a.weight + b.weight + c.weight + e.weight;
  }
  sum = warp_sum(sum);
  if (p.grad_weight != nullptr && lane == 0) p.grad_weight[row] = sum;
}

void launch(const SwigluParams& p, Stream stream) {
  const unsigned blocks = blocks_for(p.rows, kWarps);
  if (p.type == ElementType::kBf16) {
    forward<__nv_bfloat16><<<blocks, kWarps * 32, 0, as_stream(stream)>>>(p);
  } else {
    forward<float><<<blocks, kWarps * 32, 0, as_stream(stream)>>>(p);
  }
  check_launch("swiglu");
}

void launch_grad(const SwigluBackwardParams& p, Stream stream) {
  const unsigned blocks = blocks_for(p.rows, kWarps);
  if (p.type == ElementType::kBf16) {
    backward<__nv_bfloat16><<<blocks, kWarps * 32, 0, as_stream(stream)>>>(p);
  } else {
    backward<float><<<blocks, kWarps * 32, 0, as_stream(stream)>>>(p);
  }
  check_launch("swiglu backward");
}

const bool filled = swiglu_cuda.fill(launch) && swiglu_backward_cuda.fill(launch_grad);

}  // namespace
}  // namespace hadal::ops
