// The end of lists of several segments, whichever kernel folded these.
#include "ops/attention/sparse_attn_sm90.cuh"

namespace hadal::ops::cuda {
namespace {

/// Adds the segments of a head, ascending, then the sink. A thread has four channels.
__global__ void __launch_bounds__(128)
    join_segments_kernel(const __grid_constant__ SparseAttnSm90Params p, int64_t segments) {
  wait_for_previous();
  launch_dependents();
  const int64_t row = blockIdx.x, column = threadIdx.x * 4;
  const float* stats = p.scratch + scratch_stats(p, segments) + row * segments * 2;
  float max = -INFINITY, sum = 0.0f, acc[4] = {};
  for (int64_t s = 0; s < segments; ++s) {
    const float later_max = stats[s * 2], later_sum = stats[s * 2 + 1];
    if (later_max == -INFINITY) continue;
    const float4 v =
        *reinterpret_cast<const float4*>(p.scratch + (row * segments + s) * p.width + column);
    const float later[4] = {v.x, v.y, v.z, v.w};
    if (max == -INFINITY) {
      max = later_max, sum = later_sum;
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[i] = later[i];
      continue;
    }
    const float seen = fmaxf(max, later_max);
    const float a = exp_exact(max - seen), b = exp_exact(later_max - seen);
    sum = fmaf(later_sum, b, sum * a);
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[i] = fmaf(later[i], b, acc[i] * a);
    max = seen;
  }
  const bool any = max != -INFINITY;
  const float denominator = any ? sum + exp_exact(p.sink[row % p.heads] - max) : 0.0f;
  const float factor = any ? 1.0f / denominator : 0.0f;
  uint2 words;
  const __nv_bfloat162 low = __floats2bfloat162_rn(acc[0] * factor, acc[1] * factor);
  const __nv_bfloat162 high = __floats2bfloat162_rn(acc[2] * factor, acc[3] * factor);
  words.x = *reinterpret_cast<const uint32_t*>(&low);
  words.y = *reinterpret_cast<const uint32_t*>(&high);
  *reinterpret_cast<uint2*>(p.out + row * p.width + column) = words;
  if (threadIdx.x == 0 && p.stats != nullptr) {
    p.stats[row * 2] = max;
    p.stats[row * 2 + 1] = denominator;
  }
}

}  // namespace

void join_segments(const SparseAttnSm90Params& p, int64_t segments, Stream stream) {
  launch_early(join_segments_kernel,
               {blocks_for(p.tokens * p.heads, 1), static_cast<unsigned>(p.width / 4)}, stream,
               "sparse_attn_sm90", p, segments);
}

}  // namespace hadal::ops::cuda
