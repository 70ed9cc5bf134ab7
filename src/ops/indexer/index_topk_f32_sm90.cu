// The k largest of a row of FP32 scores: counts of eight bits at a time, the highest first, give
// the k-th largest value and how many of its ties belong; a last pass writes places in order. A
// block a row.
#include "ops/cuda/block_sums.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/indexer/index_bf16_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 1024, kEach = 4, kBins = 256;

/// Order of scores as integers: larger is better, NaN lowest.
__device__ __forceinline__ uint32_t rank_of(float score) {
  if (score != score) return 0;
  const uint32_t bits = __float_as_uint(score == 0.0f ? 0.0f : score);  // zeros are one value
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Memory {
  int counts[kBins];
  int warps[kThreads / 32];
  int digit, above;  ///< of the value looked for, and how many have a higher one
  int taken, equal;  ///< of the places walked so far
};

/// Adds one to a count in shared memory: integers, so that no order matters.
__device__ __forceinline__ void count_one(int* count) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(smem_address(count)) : "memory");
}

/// The digit in which the `wanted`-th largest lies; by one warp, whose lanes have 8 bins each.
__device__ __forceinline__ void find_digit(Memory& m, int wanted) {
  const int lane = static_cast<int>(threadIdx.x), first = kBins - 8 * (lane + 1);
  int mine = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) mine += m.counts[first + i];
  int before = mine;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  before -= mine;  // in higher digits
#pragma unroll
  for (int i = 7; i >= 0; --i) {
    const int count = m.counts[first + i];
    if (before < wanted && before + count >= wanted) m.digit = first + i, m.above = before;
    before += count;
  }
}

/// The rank of the `wanted`-th largest of `count` scores; `ties`: how many of its equals belong.
__device__ uint32_t
find_threshold(Memory& m, const float* scores, int count, int wanted, int& ties) {
  uint32_t threshold = 0, known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    if (threadIdx.x < kBins) m.counts[threadIdx.x] = 0;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < count; i += kThreads) {
      const uint32_t rank = rank_of(scores[i]);
      if ((rank & known) == threshold) count_one(&m.counts[rank >> shift & 255]);
    }
    __syncthreads();
    if (threadIdx.x < 32) find_digit(m, wanted);
    __syncthreads();
    threshold |= static_cast<uint32_t>(m.digit) << shift;
    known |= 255u << shift;
    wanted -= m.above;
  }
  ties = wanted;
  return threshold;
}

/// Writes the places of what is above the threshold and of its first `ties` equals, ascending.
__device__ void write_places(
    Memory& m, const float* scores, int count, uint32_t threshold, int ties, int32_t* out) {
  const int t = static_cast<int>(threadIdx.x);
  int written = 0, equal_before = 0;
  for (int first = 0; first < count; first += kThreads * kEach) {
    const int from = first + t * kEach;
    uint32_t taken = 0, equal = 0;
    if (from < count) {
      const float4 four = *reinterpret_cast<const float4*>(scores + from);
      const float v[kEach] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        if (from + j >= count) continue;
        const uint32_t rank = rank_of(v[j]);
        taken |= rank > threshold ? 1u << j : 0;
        equal |= rank == threshold ? 1u << j : 0;
      }
    }
    int tie = equal_before + sum_before(__popc(equal), m.warps);
    if (t == kThreads - 1) m.equal = tie + __popc(equal);
      // A tie is taken while there are fewer before it than belong.
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (equal >> j & 1 && tie++ < ties) taken |= 1u << j;
    }
    int place = written + sum_before(__popc(taken), m.warps);
    if (t == kThreads - 1) m.taken = place + __popc(taken);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (taken >> j & 1) out[place++] = from + j;
    }
    __syncthreads();
    equal_before = m.equal;
    written = m.taken;
    __syncthreads();
  }
}

__global__ void __launch_bounds__(kThreads)
    index_topk_f32_kernel(const __grid_constant__ IndexTopkF32Sm90Params p) {
  __shared__ Memory m;
  wait_for_previous();
  launch_dependents();
  const int64_t token = blockIdx.x;
  const float* scores = p.scores + token * p.stride;
  int32_t* out = p.blocks + token * p.k;
  const auto k = static_cast<int>(p.k), visible = static_cast<int>(p.visible[token]);
  const int wanted = min(k, visible), t = static_cast<int>(threadIdx.x);
  for (int i = wanted + t; i < k; i += kThreads) out[i] = -1;
  if (wanted == visible) {
    for (int i = t; i < wanted; i += kThreads) out[i] = i;
    return;
  }
  int ties = 0;
  const uint32_t threshold = find_threshold(m, scores, visible, wanted, ties);
  write_places(m, scores, visible, threshold, ties, out);
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void index_topk_f32_sm90(const IndexTopkF32Sm90Params& p, Stream stream) {
  if (p.tokens == 0) return;
  if (p.stride % cuda::kEach != 0)
    throw_kernel_error("index_topk_f32_sm90", "the stride of the scores is not a multiple of 4");
  cuda::launch_early(cuda::index_topk_f32_kernel, {cuda::blocks_for(p.tokens, 1), cuda::kThreads},
                     stream, "index_topk_f32_sm90", p);
}

}  // namespace hadal::ops
