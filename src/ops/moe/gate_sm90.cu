// A block a token: affinities and scores in shared memory, then the best of what is left, topk
// times.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/exact_math.h"
#include "ops/moe/gate_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 256, kMaxExperts = 1024, kMaxTopk = 32;

/// An order of scores, one zero, NaN as -infinity; 0 is below all.
__device__ __forceinline__ uint32_t ordered(float score) {
  if (!(score == score)) score = -INFINITY;
  const uint32_t bits = __float_as_uint(score + 0.0f);
  return bits ^ (bits >> 31 != 0 ? 0xffffffffu : 0x80000000u);
}

/// The chosen expert of lane k < topk, in no order: each lane has the scores of its experts, knows
/// the best, and looks again where it was taken. Ties go to the lower expert. kEach: experts of a
/// lane.
template <int kEach>
__device__ int choose(const uint32_t* all, int experts, int topk) {
  const int lane = static_cast<int>(threadIdx.x);
  int chosen = 0, own = -1;
  uint32_t best = 0, scores[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) scores[i] = lane + 32 * i < experts ? all[lane + 32 * i] : 0;
  const auto look = [&] {
    best = 0;
    own = experts;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (scores[i] <= best) continue;
      best = scores[i];
      own = lane + 32 * i;
    }
  };
  look();
  for (int k = 0; k < topk; ++k) {
    const uint32_t highest = __reduce_max_sync(0xffffffffu, best);
    const auto mine = static_cast<uint32_t>(best == highest ? own : experts);
    const auto expert = static_cast<int>(__reduce_min_sync(0xffffffffu, mine));
    if (lane == k) chosen = expert;
    if (expert == own) {
#pragma unroll
      for (int i = 0; i < kEach; ++i)
        if (lane + 32 * i == expert) scores[i] = 0;
      look();
    }
  }
  return chosen;
}

/// Affinities by all threads; the choice by one warp.
__global__ void __launch_bounds__(kThreads) gate_kernel(const __grid_constant__ GateSm90Params p) {
  __shared__ uint32_t scores[kMaxExperts];
  __shared__ float affinity[kMaxExperts];
  const auto experts = static_cast<int>(p.num_experts), topk = static_cast<int>(p.topk);
  const int64_t token = blockIdx.x;
  if (p.bias != nullptr && threadIdx.x * 32 < experts) prefetch_constant(p.bias + threadIdx.x * 32);
  wait_for_previous();
  launch_dependents();
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads) {
    affinity[e] = sqrtf(static_cast<float>(softplus64(p.logits[token * experts + e])));
    if (p.affinity != nullptr) p.affinity[token * experts + e] = affinity[e];
    if (p.bias != nullptr) scores[e] = ordered(affinity[e] + p.bias[e]);
  }
  __syncthreads();
  const int lane = static_cast<int>(threadIdx.x);
  if (lane >= 32) return;
  int chosen = 0;
  if (p.bias != nullptr) {
    chosen = experts <= 256 ? choose<8>(scores, experts, topk)
                            : choose<kMaxExperts / 32>(scores, experts, topk);
  } else if (lane < topk) {
    chosen = p.table[p.ids[token] * p.topk + lane];
  }
  int place = 0;
  float sum = 0.0f;
  for (int k = 0; k < topk; ++k) place += __shfl_sync(0xffffffffu, chosen, k) < chosen;
  for (int k = 0; k < topk; ++k) {
    // The k-th expert in ascending order.
    const uint32_t who = __ballot_sync(0xffffffffu, lane < topk && place == k);
    sum = sum + affinity[__shfl_sync(0xffffffffu, chosen, __ffs(static_cast<int>(who)) - 1)];
  }
  if (lane >= topk) return;
  p.experts[token * topk + place] = chosen;
  p.weights[token * topk + place] = affinity[chosen] / sum * p.scale;
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void gate_sm90(const GateSm90Params& p, Stream stream) {
  if (p.tokens == 0) return;
  static_assert(cuda::kMaxExperts == 1024 && cuda::kMaxTopk == 32);
  if (!serves_gate_sm90(p.num_experts, p.topk))
    throw_kernel_error("gate_sm90", "at most 1,024 experts and 32 chosen ones");
  cuda::launch_early(cuda::gate_kernel, {cuda::blocks_for(p.tokens, 1), cuda::kThreads}, stream,
                     "gate_sm90", p);
}

}  // namespace hadal::ops
