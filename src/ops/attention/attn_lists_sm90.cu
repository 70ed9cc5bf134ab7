// A thread a place of a token's list.
#include "ops/attention/attn_lists_sm90.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/row_piece.cuh"
#include "ops/cuda/sm90.cuh"

namespace hadal::ops::cuda {
namespace {

constexpr int kThreads = 128;

/// The row of window place `place`; negative: none.
__device__ __forceinline__ int64_t window_row(const AttnListsSm90Params& p,
                                              int64_t token,
                                              int64_t place) {
  const int64_t own = p.pos[token], seq = p.seq[token], first_row = p.first_row[seq];
  int64_t behind = own % p.window - place;  // how far the place's position lies behind ours
  if (behind < 0) behind += p.window;
  const int64_t position = own - behind;
  if (position < 0) return -1;
  const int64_t start = p.pos[first_row];
  return position >= start && p.step_row >= 0 ? p.step_row + first_row + position - start
                                              : p.ring_row + p.ring.row(seq, position);
}

__global__ void __launch_bounds__(kThreads)
    attn_lists_kernel(const __grid_constant__ AttnListsSm90Params p) {
  wait_for_previous();
  launch_dependents();
  const int64_t window_places = attn_window_places(p.window);
  const auto [token, piece] = row_piece((window_places + p.block_places) / kThreads + 1);
  const int64_t at = static_cast<int64_t>(piece) * kThreads + threadIdx.x;
  if (at < window_places) {
    p.window_row[token * window_places + at] =
        static_cast<int32_t>(at < p.window ? window_row(p, token, at) : -1);
    return;
  }
  const int64_t place = at - window_places;
  const int64_t visible = p.ratio == 0 ? 0 : (p.pos[token] + 1) / p.ratio;
  const int64_t most = visible < p.block_places ? visible : p.block_places;
  if (place == 0) p.num_blocks[token] = static_cast<int32_t>(most);
  if (place >= p.block_places) return;
  int64_t block = place < most ? place : -1;
  if (block >= 0 && p.selection != nullptr) block = p.selection[token * p.block_places + place];
  p.block_row[token * p.block_places + place] =
      static_cast<int32_t>(block < 0 ? -1 : p.blocks.row(p.seq[token], block));
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void attn_lists_sm90(const AttnListsSm90Params& p, Stream stream) {
  if (p.tokens == 0) return;
  const int64_t places = attn_window_places(p.window) + p.block_places;
  const unsigned grid = cuda::blocks_for(p.tokens * (places / cuda::kThreads + 1), 1);
  cuda::launch_early(cuda::attn_lists_kernel, {grid, cuda::kThreads}, stream, "attn_lists_sm90", p);
}

}  // namespace hadal::ops
