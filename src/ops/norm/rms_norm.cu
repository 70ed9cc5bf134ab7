// RMSNorm forward and backward, one warp per row.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/norm/rms_norm_kernels.h"

namespace hadal::ops {
namespace {

using cuda::as_stream;
using cuda::blocks_for;
using cuda::check_launch;
using cuda::dot4;
using cuda::load4;
using cuda::round_to;
using cuda::store4;
using cuda::sum_parts;
using cuda::to_float;
using cuda::warp_sum;
constexpr int kWarps = 8;

// reference: y = weight * (x * rsqrt(mean(x^2) + eps))
template <typename T, bool kReleased>
__global__ void forward(RmsNormParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const T* x = static_cast<const T*>(p.x) + row * p.dim;
  T* out = static_cast<T*>(p.out) + row * p.dim;
  float sum = 0.0f;
  for (int64_t i = lane * 4; i < p.dim; i += 128) {
    const float4 v = load4(x + i);
    if (kReleased) {
      sum += round_to<T>(v.x * v.x) + round_to<T>(v.y * v.y) + round_to<T>(v.z * v.z) +
             round_to<T>(v.w * v.w);
    } else {
      sum = dot4(v, v, sum);
    }
  }
  const float mean = warp_sum(sum) / static_cast<float>(p.dim);
  const float rstd = kReleased ? round_to<T>(rsqrtf(round_to<T>(round_to<T>(mean) + p.eps)))
                               : rsqrtf(mean + p.eps);
  if (lane == 0) p.rstd[row] = rstd;
  for (int64_t i = lane * 4; i < p.dim; i += 128) {
    float4 v = load4(x + i);
    v = make_float4(v.x * rstd, v.y * rstd, v.z * rstd, v.w * rstd);
    if (p.weight != nullptr) {
      const float4 w = load4(p.weight + i);
      v = make_float4(w.x * v.x, w.y * v.y, w.z * v.z, w.w * v.w);
    }
    store4(out + i, v);
  }
}

// With h = grad_out * weight: grad_x = rstd * (h - x * rstd^2 * mean(h x)).
template <typename T>
__global__ void backward_x(RmsNormBackwardParams p) {
  const int lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.rows) return;
  const T* x = static_cast<const T*>(p.x) + row * p.dim;
  const T* grad_out = static_cast<const T*>(p.grad_out) + row * p.dim;
  T* grad_x = static_cast<T*>(p.grad_x) + row * p.dim;
  const float4 ones = make_float4(1.0f, 1.0f, 1.0f, 1.0f);
  float sum = 0.0f;
  for (int64_t i = lane * 4; i < p.dim; i += 128) {
    const float4 v = load4(x + i), g = load4(grad_out + i);
    const float4 w = p.weight != nullptr ? load4(p.weight + i) : ones;
    sum = dot4(make_float4(g.x * w.x, g.y * w.y, g.z * w.z, g.w * w.w), v, sum);
  }
  const float rstd = p.rstd[row];
  const float c = warp_sum(sum) / static_cast<float>(p.dim) * rstd * rstd;
  for (int64_t i = lane * 4; i < p.dim; i += 128) {
    const float4 v = load4(x + i), g = load4(grad_out + i);
    const float4 w = p.weight != nullptr ? load4(p.weight + i) : ones;
    store4(grad_x + i, make_float4(rstd * (g.x * w.x - v.x * c), rstd * (g.y * w.y - v.y * c),
                                   rstd * (g.z * w.z - v.z * c), rstd * (g.w * w.w - v.w * c)));
  }
}

// parts[part][i] = sum over the part's rows, in order, of grad_out * x * rstd.
template <typename T>
__global__ void backward_weight(RmsNormBackwardParams p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.dim) return;
  const int64_t part = blockIdx.y;
  const int64_t rows_per_part = (p.rows + p.num_parts - 1) / p.num_parts;
  const int64_t begin = part * rows_per_part;
  const int64_t end = begin + rows_per_part < p.rows ? begin + rows_per_part : p.rows;
  const T* x = static_cast<const T*>(p.x);
  const T* grad_out = static_cast<const T*>(p.grad_out);
  float sum = 0.0f;
  for (int64_t row = begin; row < end; ++row) {
    sum =
        fmaf(to_float(grad_out[row * p.dim + i]), to_float(x[row * p.dim + i]) * p.rstd[row], sum);
  }
  p.parts[part * p.dim + i] = sum;
}

template <typename T>
void launch_forward(const RmsNormParams& p, cudaStream_t stream) {
  const unsigned blocks = blocks_for(p.rows, kWarps);
  if (p.released) {
    forward<T, true><<<blocks, kWarps * 32, 0, stream>>>(p);
  } else {
    forward<T, false><<<blocks, kWarps * 32, 0, stream>>>(p);
  }
  check_launch("rms_norm");
}

template <typename T>
void launch_backward(const RmsNormBackwardParams& p, cudaStream_t stream) {
  backward_x<T><<<blocks_for(p.rows, kWarps), kWarps * 32, 0, stream>>>(p);
  check_launch("rms_norm backward");
  if (p.weight == nullptr) return;
  const dim3 grid(blocks_for(p.dim, 128), static_cast<unsigned>(p.num_parts));
  backward_weight<T><<<grid, 128, 0, stream>>>(p);
  check_launch("rms_norm weight gradient");
  sum_parts(p.parts, p.grad_weight, p.num_parts, p.dim, stream);
}

void launch(const RmsNormParams& p, Stream stream) {
  p.type == ElementType::kBf16 ? launch_forward<__nv_bfloat16>(p, as_stream(stream))
                               : launch_forward<float>(p, as_stream(stream));
}
void launch_grad(const RmsNormBackwardParams& p, Stream stream) {
  p.type == ElementType::kBf16 ? launch_backward<__nv_bfloat16>(p, as_stream(stream))
                               : launch_backward<float>(p, as_stream(stream));
}

const bool filled = rms_norm_cuda.fill(launch) && rms_norm_backward_cuda.fill(launch_grad);

}  // namespace
}  // namespace hadal::ops
