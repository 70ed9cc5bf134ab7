// Activations to operands of the Hopper products: E4M3, where one warp takes 128 channels of a row,
// and BF16.
#include "ops/cuda/elementwise.cuh"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/row_piece.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/cuda/warp.cuh"
#include "ops/gemm/linear_sm90.h"
#include "ops/gemm/operand_rows.cuh"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kUnitThreads = 128, kMostUnitBlocks = 132 * 16;  // as many as run at once

/// Calls f(row, slab) for every row and slab of this warp, once the kernel before has ended.
template <typename F>
__device__ __forceinline__ void each_unit(int64_t rows, int64_t slabs, F f) {
  constexpr int kWarps = kUnitThreads / 32;
  int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  int64_t row = unit / slabs, slab = unit % slabs;
  wait_for_previous();
  launch_dependents();
  const int64_t step = int64_t{gridDim.x} * kWarps;
  const int64_t rows_of_step = step / slabs, slabs_of_step = step % slabs;
  while (row < rows) {
    f(row, slab);
    row += rows_of_step;
    slab += slabs_of_step;
    if (slab >= slabs) {
      slab -= slabs;
      ++row;
    }
  }
}

__global__ void quantise_kernel(const __grid_constant__ QuantiseSm90Params p) {
  each_unit(p.x_groups * 8, p.in / 128, [&](int64_t row, int64_t slab) {
    float4 v = make_float4(0, 0, 0, 0);
    if (row < p.rows) {
      const int64_t from = p.source != nullptr ? p.source[row] : row;
      if (from >= 0) {
        v = load4(static_cast<const __nv_bfloat16*>(p.x) + from * p.stride + slab * 128 +
                  threadIdx.x % 32 * 4);
      }
    }
    store_quantised(v, row, slab, p.codes, p.scales, p.x_groups);
  });
}

__global__ void swiglu_quantise_kernel(const __grid_constant__ SwigluQuantiseSm90Params p) {
  each_unit(p.x_groups * 8, p.inter / 128, [&](int64_t row, int64_t slab) {
    float4 h = make_float4(0, 0, 0, 0);
    if (row < p.rows && (p.source == nullptr || p.source[row] >= 0)) {
      const __nv_bfloat16* at = static_cast<const __nv_bfloat16*>(p.gate_up) + row * 2 * p.inter +
                                slab * 128 + threadIdx.x % 32 * 4;
      const float4 g = load4(at), u = load4(at + p.inter);
      const float w = p.weight != nullptr ? p.weight[row] : 1.0f;
      const auto one = [&](float gate, float up) {
        return round_to<__nv_bfloat16>(swiglu_exact(gate, up, w, p.limit));
      };
      h = make_float4(one(g.x, u.x), one(g.y, u.y), one(g.z, u.z), one(g.w, u.w));
    }
    store_quantised(h, row, slab, p.codes, p.scales, p.x_groups);
  });
}

/// Eight values of a row a thread: a piece of the operand.
__global__ void bf16_operand_kernel(const __grid_constant__ Bf16OperandSm90Params p) {
  const int64_t slabs = (p.in + 63) / 64;
  const auto [row, part] = row_piece((slabs * 8 + blockDim.x - 1) / blockDim.x);
  const int64_t piece = static_cast<int64_t>(part) * blockDim.x + threadIdx.x;
  wait_for_previous();
  launch_dependents();
  if (piece >= slabs * 8) return;
  uint4 v = make_uint4(0, 0, 0, 0);
  if (row < p.rows && piece * 8 < p.in) {
    const int64_t from = p.source != nullptr ? p.source[row] : row;
    if (from >= 0) {
      v = *reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) + from * p.stride +
                                          piece * 8);
    }
  }
  *reinterpret_cast<uint4*>(p.operand + sm90::operand_offset(row, piece * 16, p.x_groups)) = v;
}

/// A grid of warps, for all rows and slabs, that may start beside the kernel before it.
template <typename Params>
void launch_units(
    void (*kernel)(Params), const Params& p, int64_t units, Stream stream, const char* name) {
  if (units == 0) return;
  const unsigned blocks = min(blocks_for(units, kUnitThreads / 32), unsigned{kMostUnitBlocks});
  launch_early(kernel, {blocks, kUnitThreads}, stream, name, p);
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void quantise_operand_sm90(const QuantiseSm90Params& p, Stream stream) {
  cuda::launch_units(cuda::quantise_kernel, p, p.x_groups * 8 * (p.in / 128), stream,
                     "quantise_operand_sm90");
}

void bf16_operand_sm90(const Bf16OperandSm90Params& p, Stream stream) {
  if (p.x_groups == 0) return;
  if (p.in % 8 != 0 || p.stride % 8 != 0)
    throw_kernel_error("bf16_operand_sm90", "rows of a multiple of 8 values");
  const int64_t pieces = sm90::round_up(p.in, 64) / 8;
  const auto threads = static_cast<unsigned>(pieces < 256 ? sm90::round_up(pieces, 32) : 256);
  const unsigned grid = cuda::blocks_for(p.x_groups * 8 * ((pieces + threads - 1) / threads), 1);
  cuda::launch_early(cuda::bf16_operand_kernel, {grid, threads}, stream, "bf16_operand_sm90", p);
}

void swiglu_quantise_sm90(const SwigluQuantiseSm90Params& p, Stream stream) {
  cuda::launch_units(cuda::swiglu_quantise_kernel, p, p.x_groups * 8 * (p.inter / 128), stream,
                     "swiglu_quantise_sm90");
}

}  // namespace hadal::ops
