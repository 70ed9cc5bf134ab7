// Rows that lie sorted by expert to runs, by one block.
#include "ops/cuda/block_sums.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/gemm/linear_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 1024;

/// A thread an expert finds where its rows go; then a warp an expert writes them.
__global__ void __launch_bounds__(kThreads)
    pad_groups_kernel(const __grid_constant__ PadGroupsSm90Params p) {
  __shared__ int first_of[kThreads], begin_of[kThreads], count_of[kThreads];
  __shared__ int warps[kThreads / 32];
  wait_for_previous();
  launch_dependents();
  const int t = static_cast<int>(threadIdx.x);
  for (int64_t i = t; i < p.rows; i += kThreads) p.source[i] = -1;
  int begin = 0, count = 0;
  if (t < p.num_experts) {
    begin = static_cast<int>(p.offsets[t]);
    count = static_cast<int>(p.offsets[t + 1]) - begin;
  }
  const int first_row = sum_before((count + 7) / 8 * 8, warps);
  const int run = sum_before(count > 0, warps);
  if (count > 0) p.runs[run] = {t, first_row, count};
  if (t == kThreads - 1) *p.num_runs = run + (count > 0);
  first_of[t] = first_row;
  begin_of[t] = begin;
  count_of[t] = count;
  __syncthreads();
  for (int expert = t / 32; expert < p.num_experts; expert += kThreads / 32) {
    for (int i = t % 32; i < count_of[expert]; i += 32) {
      p.source[first_of[expert] + i] = begin_of[expert] + i;
      p.place[begin_of[expert] + i] = first_of[expert] + i;
    }
  }
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void pad_groups_sm90(const PadGroupsSm90Params& p, Stream stream) {
  if (p.num_experts > cuda::kThreads)
    throw_kernel_error("pad_groups_sm90", "more than 1,024 experts");
  if (p.rows < max_routed_rows(p.count, 1, p.num_experts))
    throw_kernel_error("pad_groups_sm90", "too few rows for any groups");
  cuda::launch_early(cuda::pad_groups_kernel, {1, cuda::kThreads}, stream, "pad_groups_sm90", p);
}

}  // namespace hadal::ops
