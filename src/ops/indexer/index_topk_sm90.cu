// The k largest of a row of BF16 scores: counts of the upper 11 and then the lower 5 bits give the
// k-th largest value and how many of its ties belong; a last pass writes places in order. A cluster
// of blocks shares a long row: each has a run of places, and reads the others' counts.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/indexer/index_scores_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 1024, kBins = 2048, kEach = 8, kCopies = 4;

/// Order of scores as integers: larger is better, NaN lowest.
__device__ __forceinline__ uint32_t rank_of(uint32_t bits) {
  if ((bits & 0x7fff) > 0x7f80) return 0;
  if (bits == 0x8000) bits = 0;  // the two zeros are one value
  return bits & 0x8000 ? 0xffffu - bits : bits | 0x8000u;
}

struct Memory {
  int counts[kCopies][kBins];  ///< copies keep warps out of each other's way; [0] ends as the sum
  int low[32];
  int warps[kThreads / 32];
  int greater, equal;  ///< of this block's places: above the threshold, at it
  int found, above;
};

/// Adds one to a count in shared memory: integers, so that no order matters.
__device__ __forceinline__ void count_one(int* count) {
  asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(smem_address(count)) : "memory");
}

/// An integer of another block's shared memory.
__device__ __forceinline__ int load_count(const int* local, uint32_t rank) {
  return __float_as_int(load_remote(reinterpret_cast<const float*>(local), rank));
}

/// Sum of `value` over the threads before this one, and over all in *total.
__device__ int sum_before(int value, int* warps, int* total) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  int before = 0, all = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) {
    const int count = warps[i];
    before += i < warp ? count : 0;
    all += count;
  }
  __syncthreads();
  *total = all;
  return before + sum - value;
}

/// Calls f(place, score) for the places [begin, end) of this block, eight to a load.
template <typename F>
__device__ __forceinline__ void each_score(const uint16_t* scores, int begin, int end, F f) {
  for (int first = begin + static_cast<int>(threadIdx.x) * kEach; first < end;
       first += kThreads * kEach) {
    const uint4 eight = *reinterpret_cast<const uint4*>(scores + first);
    const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (first + j < end) f(first + j, rank_of(words[j / 2] >> (j % 2 * 16) & 0xffff));
    }
  }
}

template <int kBlocks>
__device__ __forceinline__ void meet() {
  if constexpr (kBlocks > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
}

/// The sum of a count over the blocks before this one, or over all.
template <int kBlocks>
__device__ __forceinline__ int sum_blocks(const int* local, uint32_t blocks) {
  if constexpr (kBlocks == 1) return blocks == 0 ? 0 : *local;
  int sum = 0;
  for (uint32_t rank = 0; rank < blocks; ++rank) sum += load_count(local, rank);
  return sum;
}

/// The two bins of a thread, the highest first.
__device__ __forceinline__ int bin_of(int i) {
  return kBins - 1 - (static_cast<int>(threadIdx.x) * 2 + i);
}

/// Finds the bin in which the `wanted`-th largest lies, from each thread's two counts.
__device__ void find_bin(Memory& m, const int (&counts)[2], int wanted) {
  int all = 0, before = sum_before(counts[0] + counts[1], m.warps, &all);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (before < wanted && before + counts[i] >= wanted) m.found = bin_of(i), m.above = before;
    before += counts[i];
  }
  __syncthreads();
}

template <int kBlocks>
__global__ void __launch_bounds__(kThreads)
    index_topk_kernel(const __grid_constant__ IndexTopkSm90Params p) {
  extern __shared__ __align__(16) uint8_t raw[];
  auto& m = *reinterpret_cast<Memory*>(raw);
  for (int i = static_cast<int>(threadIdx.x); i < kCopies * kBins; i += kThreads)
    m.counts[i / kBins][i % kBins] = 0;
  wait_for_previous();
  launch_dependents();
  const int64_t token = blockIdx.x / kBlocks;
  const uint32_t rank = kBlocks > 1 ? cluster_rank() : 0;
  const uint16_t* scores = p.scores + token * p.stride;
  int32_t* out = p.blocks + token * p.k;
  const auto visible = static_cast<int>(p.visible[token]), t = static_cast<int>(threadIdx.x);
  const auto k = static_cast<int>(p.k), wanted = min(k, visible);
  if (rank == 0) {
    for (int i = wanted + t; i < k; i += kThreads) out[i] = -1;
  }
  if (wanted == visible) {  // in all blocks of the cluster alike
    if (rank == 0) {
      for (int i = t; i < wanted; i += kThreads) out[i] = i;
    }
    return;
  }
  const int share = (visible + kBlocks * kEach - 1) / (kBlocks * kEach) * kEach;
  const int begin = min(static_cast<int>(rank) * share, visible), end = min(begin + share, visible);

  if (t < 32) m.low[t] = 0;
  __syncthreads();
  int* copy = m.counts[t / 32 % kCopies];
  each_score(scores, begin, end, [&](int, uint32_t r) { count_one(&copy[r >> 5]); });
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int bin = bin_of(i);
    for (int c = 1; c < kCopies; ++c) m.counts[0][bin] += m.counts[c][bin];
  }
  meet<kBlocks>();
  int counts[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) counts[i] = sum_blocks<kBlocks>(&m.counts[0][bin_of(i)], kBlocks);
  find_bin(m, counts, wanted);
  const int bin = m.found, over = m.above;

  each_score(scores, begin, end, [&](int, uint32_t r) {
    if (static_cast<int>(r >> 5) == bin) count_one(&m.low[r & 31]);
  });
  // This block's places above the bin.
  int greater = 0;
  for (int i = 0; i < 2; ++i) greater += bin_of(i) > bin ? m.counts[0][bin_of(i)] : 0;
  int all_greater = 0;
  sum_before(greater, m.warps, &all_greater);
  meet<kBlocks>();
  if (t < 32) {
    // Lane i holds how many have the bin's value i; the highest 32 - i of them together decide.
    const int mine = sum_blocks<kBlocks>(&m.low[t], kBlocks);
    int from_here = mine, local = m.low[t];
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_down_sync(0xffffffffu, from_here, step);
      if (t + step < 32) from_here += other;
    }
    const int need = wanted - over;
    if (from_here >= need && from_here - mine < need) {
      m.found = bin * 32 + t;
      m.above = over + from_here - mine;
    }
    __syncwarp();
    const int threshold_low = m.found & 31;
    int local_greater = t > threshold_low ? local : 0;
    for (int step = 16; step > 0; step /= 2)
      local_greater += __shfl_xor_sync(0xffffffffu, local_greater, step);
    if (t == threshold_low) m.equal = local;
    if (t == 0) m.greater = all_greater + local_greater;
  }
  meet<kBlocks>();
  const auto threshold = static_cast<uint32_t>(m.found);
  const int ties = wanted - m.above;  // of the threshold's value, the lowest places
  int equal_before = sum_blocks<kBlocks>(&m.equal, rank);
  int written = sum_blocks<kBlocks>(&m.greater, rank) + min(equal_before, ties);
  for (int first = begin; first < end; first += kThreads * kEach) {
    const int from = first + t * kEach;
    uint32_t taken = 0;
    int equal = 0;
    if (from < end) {
      const uint4 eight = *reinterpret_cast<const uint4*>(scores + from);
      const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const uint32_t r = rank_of(words[j / 2] >> (j % 2 * 16) & 0xffff);
        if (from + j < end && r > threshold) taken |= 1u << j;
        if (from + j < end && r == threshold) taken |= 0x100u << j, ++equal;
      }
    }
    int all_equal = 0, all_taken = 0;
    int tie = equal_before + sum_before(equal, m.warps, &all_equal);
    // A tie is taken while there are fewer before it than belong.
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (taken >> (8 + j) & 1 && tie++ < ties) taken |= 1u << j;
    }
    int place = written + sum_before(__popc(taken & 255), m.warps, &all_taken);
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (taken >> j & 1) out[place++] = from + j;
    }
    equal_before += all_equal;
    written += all_taken;
  }
  if constexpr (kBlocks > 1) cluster_sync();  // nobody leaves while its counts are read
}

template <int kBlocks>
void launch(const IndexTopkSm90Params& p, Stream stream) {
  auto* kernel = index_topk_kernel<kBlocks>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Memory));
  launch_early(kernel, {blocks_for(p.tokens * kBlocks, 1), kThreads, sizeof(Memory), kBlocks},
               stream, "index_topk_sm90", p);
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void index_topk_sm90(const IndexTopkSm90Params& p, Stream stream) {
  if (p.tokens == 0) return;
  if (p.stride % 8 != 0)
    throw_kernel_error("index_topk_sm90", "the stride of the scores is not a multiple of 8");
  // Rows that a block reads in two loads a thread are its own; few longer ones are shared.
  if (p.stride <= 16384 || p.tokens > 64) {
    cuda::launch<1>(p, stream);
  } else {
    cuda::launch<8>(p, stream);
  }
}

}  // namespace hadal::ops
