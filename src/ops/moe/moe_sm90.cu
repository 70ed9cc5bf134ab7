// Routing: each expert reads all choices, so that the order within an expert is that of the tokens
// without any sorting. Of few tokens by one block, a thread an expert; of many a warp an expert,
// which counts first and places then.
#include "ops/cuda/block_sums.cuh"
#include "ops/cuda/elementwise.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/row_piece.cuh"
#include "ops/cuda/rows.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/moe/moe_sm90.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 1024, kPiece = 8192;

__global__ void __launch_bounds__(kThreads)
    route_kernel(const __grid_constant__ RouteSm90Params p) {
  __shared__ int16_t experts[kPiece];
  __shared__ int warps[kThreads / 32];
  wait_for_previous();
  launch_dependents();
  const int t = static_cast<int>(threadIdx.x), expert = t;
  const auto choices = static_cast<int>(p.tokens * p.topk), topk = static_cast<int>(p.topk);
  const bool exists = expert < p.num_experts;
  for (int64_t i = t; i < p.rows; i += kThreads) {
    p.source[i] = -1;
    p.row_weight[i] = 0.0f;
  }
  const auto each_piece = [&](auto f) {
    for (int first = 0; first < choices; first += kPiece) {
      const int count = min(kPiece, choices - first);
      __syncthreads();
      for (int i = t; i < count; i += kThreads)
        experts[i] = static_cast<int16_t>(p.experts[first + i]);
      __syncthreads();
      if (!exists) continue;
      for (int i = 0; i < count; ++i) {
        if (experts[i] == expert) f(first + i);
      }
    }
  };
  int count = 0;
  each_piece([&](int) { ++count; });
  const int first_row = sum_before((count + 7) / 8 * 8, warps);
  const int run = sum_before(count > 0, warps);
  if (count > 0) p.runs[run] = {expert, first_row, count};
  if (t == kThreads - 1) *p.num_runs = run + (count > 0);
  int row = first_row;
  each_piece([&](int choice) {
    p.source[row] = choice / topk;
    p.row_weight[row] = p.weights[choice];
    p.place[choice] = row++;
  });
}

/// Calls f(choice, rank) for the choices of an expert, in order, by the lanes of its warp;
/// `experts` is memory of the block, all of whose warps take part. Returns their number.
template <typename F>
__device__ __forceinline__ int each_choice(const RouteSm90Params& p,
                                           int expert,
                                           int16_t* experts,
                                           F f) {
  const int t = static_cast<int>(threadIdx.x), lane = t % 32;
  const auto choices = static_cast<int>(p.tokens * p.topk);
  int count = 0;
  for (int first = 0; first < choices; first += kPiece) {
    const int in_piece = min(kPiece, choices - first);
    __syncthreads();
    for (int i = t; i < in_piece; i += kThreads)
      experts[i] = static_cast<int16_t>(p.experts[first + i]);
    __syncthreads();
    for (int i = lane; i - lane < in_piece; i += 32) {
      const bool ours = i < in_piece && experts[i] == expert;
      const unsigned all = __ballot_sync(0xffffffffu, ours);
      if (ours) f(first + i, count + __popc(all & ((1u << lane) - 1)));
      count += __popc(all);
    }
  }
  return count;
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(const __grid_constant__ RouteSm90Params p) {
  __shared__ int16_t experts[kPiece];
  wait_for_previous();
  launch_dependents();
  const int expert = static_cast<int>(blockIdx.x * (kThreads / 32) + threadIdx.x / 32);
  const int count = each_choice(p, expert, experts, [](int, int) {});
  if (expert < p.num_experts && threadIdx.x % 32 == 0) p.counts[expert] = count;
}

__global__ void __launch_bounds__(kThreads)
    place_kernel(const __grid_constant__ RouteSm90Params p) {
  __shared__ int16_t experts[kPiece];
  __shared__ int warps[kThreads / 32], first_rows[kThreads], rows_in_all;
  wait_for_previous();
  launch_dependents();
  const int t = static_cast<int>(threadIdx.x), topk = static_cast<int>(p.topk);
  // Every block sums all counts.
  const int own = t < p.num_experts ? p.counts[t] : 0, padded = (own + 7) / 8 * 8;
  first_rows[t] = sum_before(padded, warps);
  const int run = sum_before(own > 0, warps);
  if (t == kThreads - 1) rows_in_all = first_rows[t] + padded;
  if (blockIdx.x == 0) {
    if (own > 0) p.runs[run] = {t, first_rows[t], own};
    if (t == kThreads - 1) *p.num_runs = run + (own > 0);
  }
  __syncthreads();
  const auto clear = [&](int64_t row) {
    p.source[row] = -1;
    p.row_weight[row] = 0.0f;
  };
  for (int64_t row = rows_in_all + blockIdx.x * int64_t{kThreads} + t; row < p.rows;
       row += int64_t{gridDim.x} * kThreads)
    clear(row);
  const int expert = static_cast<int>(blockIdx.x * (kThreads / 32)) + t / 32;
  const bool exists = expert < p.num_experts;
  const int first = exists ? first_rows[expert] : 0;
  const int count = each_choice(p, expert, experts, [&](int choice, int rank) {
    const int row = first + rank;
    p.source[row] = choice / topk;
    p.row_weight[row] = p.weights[choice];
    p.place[choice] = row;
  });
  const int behind = first + count + t % 32;
  if (exists && behind < first + (count + 7) / 8 * 8) clear(behind);
}

/// Four channels a thread.
__global__ void swiglu_kernel(const __grid_constant__ SwigluSm90Params p) {
  wait_for_previous();
  launch_dependents();
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
  if (at >= p.rows * p.inter) return;
  const float4 g = load4(static_cast<const __nv_bfloat16*>(p.gate) + at);
  const float4 u = load4(static_cast<const __nv_bfloat16*>(p.up) + at);
  const float w = p.weight != nullptr ? p.weight[at / p.inter] : 1.0f;
  store4(static_cast<__nv_bfloat16*>(p.out) + at,
         make_float4(swiglu_exact(g.x, u.x, w, p.limit), swiglu_exact(g.y, u.y, w, p.limit),
                     swiglu_exact(g.z, u.z, w, p.limit), swiglu_exact(g.w, u.w, w, p.limit)));
}

/// Four channels a thread.
__global__ void combine_kernel(const __grid_constant__ CombineSm90Params p) {
  wait_for_previous();
  launch_dependents();
  const auto [token, piece] = row_piece((p.dim + 511) / 512);
  const int64_t i = piece * int64_t{512} + threadIdx.x * 4;
  if (i >= p.dim) return;
  const auto add = [](float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
  };
  const auto* rows = static_cast<const __nv_bfloat16*>(p.rows) + i;
  const int32_t* place = p.place + token * p.topk;
  float4 sum = load4(rows + place[0] * p.dim);
  for (int64_t k = 1; k < p.topk; ++k) sum = add(sum, load4(rows + place[k] * p.dim));
  const int64_t at = token * p.dim + i;
  store4(static_cast<__nv_bfloat16*>(p.out) + at,
         add(sum, load4(static_cast<const __nv_bfloat16*>(p.shared) + at)));
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void route_sm90(const RouteSm90Params& p, Stream stream) {
  if (p.num_experts > cuda::kThreads) throw_kernel_error("route_sm90", "more than 1,024 experts");
  if (p.rows < max_routed_rows(p.tokens, p.topk, p.num_experts))
    throw_kernel_error("route_sm90", "too few rows for any choice of experts");
  if (p.counts == nullptr)
    return cuda::launch_early(cuda::route_kernel, {1, cuda::kThreads}, stream, "route_sm90", p);
  const unsigned blocks = cuda::blocks_for(p.num_experts, cuda::kThreads / 32);
  cuda::launch_early(cuda::count_kernel, {blocks, cuda::kThreads}, stream, "route_sm90", p);
  cuda::launch_early(cuda::place_kernel, {blocks, cuda::kThreads}, stream, "route_sm90", p);
}

void swiglu_sm90(const SwigluSm90Params& p, Stream stream) {
  if (p.rows == 0) return;
  if (!serves_moe_rows_sm90(p.inter))
    throw_kernel_error("swiglu_sm90", "rows of a multiple of 4 values");
  cuda::launch_early(cuda::swiglu_kernel, {cuda::blocks_for(p.rows * p.inter, 1024), 256}, stream,
                     "swiglu_sm90", p);
}

void combine_sm90(const CombineSm90Params& p, Stream stream) {
  if (p.tokens == 0) return;
  if (!serves_moe_rows_sm90(p.dim))
    throw_kernel_error("combine_sm90", "rows of a multiple of 4 values");
  const unsigned grid = cuda::blocks_for(p.tokens * ((p.dim + 511) / 512), 1);
  cuda::launch_early(cuda::combine_kernel, {grid, 128}, stream, "combine_sm90", p);
}

}  // namespace hadal::ops
