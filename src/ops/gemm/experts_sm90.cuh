// What the products of rows grouped by expert share: a block takes 64 outputs of one expert and
// S::rows of its rows at a time; one warp feeds a ring of slabs, one warpgroup multiplies. Device
// code for sm_90a only.
//
// A shape S has rows, stages, w_bytes (of a tile of 64 outputs and one slab of K), w_at and
// scale_at (where weights and scales of rows lie in a stage), stage_bytes, scaled (rows have
// scales) and padded (outputs may be no multiple of 64).
#pragma once

#include "ops/cuda/launch.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/gemm/linear_sm90.h"

namespace hadal::ops::cuda {

/// A place in the ring.
template <typename S>
struct Turn {
  uint32_t stage = 0, parity = 0;
  __device__ __forceinline__ void next() {
    stage = stage + 1 == S::stages ? 0 : stage + 1;
    parity ^= stage == 0;
  }
};

/// The work of a block: 64 outputs of the rows of a run.
struct ExpertItem {
  ExpertRun run;
  int64_t tile;
};

/// Feeds the ring. Weights are on their way before the kernel before us has ended; what it writes
/// may be x.
template <typename S>
__device__ void produce_slabs(const ExpertsSm90Params& p,
                              const ExpertItem& item,
                              uint8_t* ring,
                              uint64_t* full,
                              uint64_t* empty) {
  const int64_t tiles = (p.outputs + 63) / 64;
  const uint8_t* w = p.w + (item.run.expert * p.slabs * tiles + item.tile) * S::w_bytes;
  const auto rows_groups = [&](int64_t first) {
    return static_cast<uint32_t>(min((item.run.rows - first + 7) / 8, int64_t{S::rows / 8}));
  };
  const auto load_w = [&](uint32_t stage, int64_t slab, uint32_t groups) {
    constexpr uint32_t kOfGroup = 1024 + (S::scaled ? 32 : 0);
    barrier_arrive_expect(&full[stage], S::w_bytes + groups * kOfGroup);
    bulk_copy(ring + stage * S::stage_bytes + S::w_at, w + slab * tiles * S::w_bytes, S::w_bytes,
              &full[stage]);
  };
  const auto load_x = [&](uint32_t stage, int64_t slab, int64_t first, uint32_t groups) {
    uint8_t* at = ring + stage * S::stage_bytes;
    const int64_t row = item.run.first_row + first;
    bulk_copy(at, p.x + (slab * p.x_groups + row / 8) * 1024, groups * 1024, &full[stage]);
    if constexpr (S::scaled)
      bulk_copy(at + S::scale_at, p.x_scale + slab * p.x_groups * 8 + row, groups * 32,
                &full[stage]);
  };
  const auto ahead = static_cast<uint32_t>(min(p.slabs, int64_t{S::stages}));
  for (uint32_t stage = 0; stage < ahead; ++stage) load_w(stage, stage, rows_groups(0));
  wait_for_previous();
  for (uint32_t stage = 0; stage < ahead; ++stage) load_x(stage, stage, 0, rows_groups(0));
  Turn<S> turn;
  for (uint32_t stage = 0; stage < ahead; ++stage) turn.next();
  for (int64_t first = 0; first < item.run.rows; first += S::rows) {
    for (int64_t slab = first == 0 ? ahead : 0; slab < p.slabs; ++slab, turn.next()) {
      barrier_wait(&empty[turn.stage], turn.parity ^ 1);
      load_w(turn.stage, slab, rows_groups(first));
      load_x(turn.stage, slab, first, rows_groups(first));
    }
  }
}

/// The thread's sums to rows [first, first + count) and 64 columns of y, of which there are
/// `outputs`.
template <typename S>
__device__ __forceinline__ void store_rows(const Sm90Output& out,
                                           const float (&run)[S::rows / 2],
                                           int64_t first,
                                           int64_t count,
                                           int64_t column,
                                           int64_t outputs) {
  const int t = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int j = 0; j < S::rows / 2; ++j) {
    const int row = j / 4 * 8 + t % 4 * 2 + (j & 1);
    if (row >= count) continue;
    const int64_t to = column + t / 32 * 16 + t % 32 / 4 + (j & 2) * 4;
    if (S::padded && to >= outputs) continue;
    const int64_t at = (first + row) * out.stride + to;
    if (out.type == ElementType::kF32) {
      static_cast<float*>(out.y)[at] = run[j];
    } else {
      static_cast<__nv_bfloat16*>(out.y)[at] = __float2bfloat16_rn(run[j]);
    }
  }
}

}  // namespace hadal::ops::cuda
