// Loss and gradient of each row of logits, one block per row.
#include <cfloat>

#include "ops/cuda/launch.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/loss/cross_entropy_kernels.h"

namespace hadal::ops {
namespace {

using cuda::as_stream;
using cuda::blocks_for;
using cuda::check_launch;
using cuda::load4;
using cuda::store4;

constexpr int kThreads = 512, kWarps = kThreads / 32;

/// A sum of exponentials relative to the largest term seen.
struct ExpSum {
  float highest, sum;
};

__device__ inline ExpSum merge(ExpSum a, ExpSum b) {
  const float highest = fmaxf(a.highest, b.highest);
  return {highest, fmaf(a.sum, __expf(a.highest - highest), b.sum * __expf(b.highest - highest))};
}

/// The row's largest logit and its exponentials' sum, in every thread, merged in a fixed order.
__device__ ExpSum reduce_row(const float* logits, int64_t vocab) {
  __shared__ ExpSum by_warp[kWarps];
  ExpSum own = {-FLT_MAX, 0.0f};
  for (int64_t c = threadIdx.x * 4; c < vocab; c += kThreads * 4) {
    const float4 x = load4(logits + c);
    const float highest = fmaxf(own.highest, fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w)));
    const float terms = (__expf(x.x - highest) + __expf(x.y - highest)) +
                        (__expf(x.z - highest) + __expf(x.w - highest));
    own.sum = fmaf(own.sum, __expf(own.highest - highest), terms);
    own.highest = highest;
  }
  // A pair's two lanes have to agree bit by bit: the lower lane's value comes first in both.
  for (int offset = 16; offset > 0; offset /= 2) {
    const ExpSum other = {__shfl_xor_sync(0xffffffffu, own.highest, offset),
                          __shfl_xor_sync(0xffffffffu, own.sum, offset)};
    own = (threadIdx.x & offset) == 0 ? merge(own, other) : merge(other, own);
  }
  if (threadIdx.x % 32 == 0) by_warp[threadIdx.x / 32] = own;
  __syncthreads();
  ExpSum all = by_warp[0];
  for (int w = 1; w < kWarps; ++w) all = merge(all, by_warp[w]);
  return all;
}

__global__ void __launch_bounds__(kThreads) loss_and_gradient(CrossEntropyParams p) {
  const int64_t row = blockIdx.x;
  const int64_t target = p.targets[row];
  const float* logits = p.logits + row * p.vocab;
  __nv_bfloat16* grad = static_cast<__nv_bfloat16*>(p.grad);
  if (grad != nullptr) grad += row * p.vocab;
  if (target < 0) {
    if (threadIdx.x == 0) p.loss[row] = 0.0f;
    if (grad == nullptr) return;
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (int64_t c = threadIdx.x * 4; c < p.vocab; c += kThreads * 4) store4(grad + c, zero);
    return;
  }
  const ExpSum all = reduce_row(logits, p.vocab);
  if (threadIdx.x == 0) {
    p.loss[row] = target < p.vocab ? logf(all.sum) - (logits[target] - all.highest) : nanf("");
  }
  if (grad == nullptr) return;
  const float inverse = 1.0f / all.sum;
  for (int64_t c = threadIdx.x * 4; c < p.vocab; c += kThreads * 4) {
    const float4 x = load4(logits + c);
    float g[4] = {__expf(x.x - all.highest) * inverse, __expf(x.y - all.highest) * inverse,
                  __expf(x.z - all.highest) * inverse, __expf(x.w - all.highest) * inverse};
    for (int i = 0; i < 4; ++i) g[i] -= c + i == target ? 1.0f : 0.0f;
    store4(grad + c, make_float4(g[0], g[1], g[2], g[3]));
  }
}

void launch(const CrossEntropyParams& p, Stream stream) {
  loss_and_gradient<<<blocks_for(p.rows, 1), kThreads, 0, as_stream(stream)>>>(p);
  check_launch("cross_entropy");
}

const bool filled = cross_entropy_cuda.fill(launch);

}  // namespace
}  // namespace hadal::ops
