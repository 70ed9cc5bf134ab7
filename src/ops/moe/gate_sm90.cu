// A block a token: affinities and scores in shared memory, then the best of what is left, topk
// times. Of few tokens all by one block, which sorts the choices by expert, too.
#include "ops/cuda/block_sums.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/exact_math.h"
#include "ops/moe/gate_sm90.h"
#include "ops/moe/moe_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 256, kMaxExperts = 1024, kMaxTopk = 32;
constexpr int kMaxRouted = static_cast<int>(kGateRouteScores);

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
  const int lane = static_cast<int>(threadIdx.x) % 32;
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

/// By one warp: the experts of a token, ascending, and their weights, of which lane k < topk gets
/// one, with its place among them.
struct Choice {
  int expert, place;
  float weight;
};
__device__ __forceinline__ Choice choose_of(const GateSm90Params& p,
                                            int64_t token,
                                            const uint32_t* scores,
                                            const float* affinity) {
  const auto experts = static_cast<int>(p.num_experts), topk = static_cast<int>(p.topk);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  Choice c = {0, 0, 0.0f};
  if (p.bias != nullptr) {
    c.expert = experts <= 256 ? choose<8>(scores, experts, topk)
                              : choose<kMaxExperts / 32>(scores, experts, topk);
  } else if (lane < topk) {
    const int64_t row = p.ids != nullptr ? p.ids[token] : token;
    c.expert = static_cast<int>(p.table[row * p.topk + lane]);
  }
  float sum = 0.0f;
  for (int k = 0; k < topk; ++k) c.place += __shfl_sync(0xffffffffu, c.expert, k) < c.expert;
  for (int k = 0; k < topk; ++k) {
    // The k-th expert in ascending order.
    const uint32_t who = __ballot_sync(0xffffffffu, lane < topk && c.place == k);
    sum = sum + affinity[__shfl_sync(0xffffffffu, c.expert, __ffs(static_cast<int>(who)) - 1)];
  }
  if (lane < topk) {
    c.weight = affinity[c.expert] / sum * p.scale;
    p.experts[token * topk + c.place] = c.expert;
    p.weights[token * topk + c.place] = c.weight;
  }
  return c;
}

/// Affinity and score of element `i` of the logits [tokens, experts].
__device__ __forceinline__ void score_of(
    const GateSm90Params& p, int64_t i, int expert, uint32_t& score, float& affinity) {
  affinity = sqrtf(static_cast<float>(softplus64(p.logits[i])));
  if (p.affinity != nullptr) p.affinity[i] = affinity;
  if (p.bias != nullptr) score = ordered(affinity + p.bias[expert]);
}

__device__ __forceinline__ void prefetch_bias(const GateSm90Params& p) {
  if (p.bias != nullptr && threadIdx.x * 32 < p.num_experts)
    prefetch_constant(p.bias + threadIdx.x * 32);
}

/// Affinities by all threads; the choice by one warp.
__global__ void __launch_bounds__(kThreads) gate_kernel(const __grid_constant__ GateSm90Params p) {
  __shared__ uint32_t scores[kMaxExperts];
  __shared__ float affinity[kMaxExperts];
  const auto experts = static_cast<int>(p.num_experts);
  const int64_t token = blockIdx.x;
  prefetch_bias(p);
  wait_for_previous();
  launch_dependents();
  for (int e = static_cast<int>(threadIdx.x); e < experts; e += kThreads)
    score_of(p, token * experts + e, e, scores[e], affinity[e]);
  __syncthreads();
  if (threadIdx.x < 32) choose_of(p, token, scores, affinity);
}

/// Of few tokens: a warp chooses for a token, then a thread an expert looks through all choices.
__global__ void __launch_bounds__(1024)
    gate_route_kernel(const __grid_constant__ GateSm90Params p,
                      const __grid_constant__ RouteSm90Params r) {
  __shared__ uint32_t scores[kMaxRouted];
  __shared__ float affinity[kMaxRouted];
  __shared__ float weight[kGateRouteTokens * kMaxTopk];
  __shared__ int chosen[kGateRouteTokens * kMaxTopk];
  __shared__ int warps[32];
  const auto experts = static_cast<int>(p.num_experts), topk = static_cast<int>(p.topk);
  const auto tokens = static_cast<int>(p.tokens), threads = static_cast<int>(blockDim.x);
  const int t = static_cast<int>(threadIdx.x);
  prefetch_bias(p);
  wait_for_previous();
  launch_dependents();
  for (int i = t; i < tokens * experts; i += threads)
    score_of(p, i, i % experts, scores[i], affinity[i]);
  for (int64_t i = t; i < r.rows; i += threads) {
    r.source[i] = -1;
    r.row_weight[i] = 0.0f;
  }
  __syncthreads();
  for (int token = t / 32; token < tokens; token += threads / 32) {
    const Choice c = choose_of(p, token, scores + token * experts, affinity + token * experts);
    if (t % 32 >= topk) continue;
    chosen[token * topk + c.place] = c.expert;
    weight[token * topk + c.place] = c.weight;
  }
  __syncthreads();
  int count = 0;
  for (int i = 0; i < tokens * topk; ++i) count += chosen[i] == t;
  const int first = sum_before((count + 7) / 8 * 8, warps), run = sum_before(count > 0, warps);
  if (count > 0) r.runs[run] = {t, first, count};
  if (t == threads - 1) *r.num_runs = run + (count > 0);
  if (count == 0) return;
  int row = first;
  for (int i = 0; i < tokens * topk; ++i) {
    if (chosen[i] != t) continue;
    r.source[row] = i / topk;
    r.row_weight[row] = weight[i];
    r.place[i] = row++;
  }
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

void gate_route_sm90(const GateRouteSm90Params& p, Stream stream) {
  const GateSm90Params& gate = p.gate;
  if (gate.tokens == 0) return;
  if (!serves_gate_route_sm90(gate.tokens, gate.num_experts, gate.topk))
    throw_kernel_error("gate_route_sm90", "more tokens or experts than one block takes");
  if (p.route.rows < max_routed_rows(gate.tokens, gate.topk, gate.num_experts))
    throw_kernel_error("gate_route_sm90", "too few rows for any choice of experts");
  // A thread for every expert, and more for several tokens' affinities.
  const auto experts = static_cast<unsigned>((gate.num_experts + 31) / 32 * 32);
  const auto wanted = static_cast<unsigned>(gate.tokens) * 256;
  const unsigned threads = experts > wanted ? experts : wanted < 1024 ? wanted : 1024;
  cuda::launch_early(cuda::gate_route_kernel, {1, threads}, stream, "gate_route_sm90", gate,
                     p.route);
}

}  // namespace hadal::ops
