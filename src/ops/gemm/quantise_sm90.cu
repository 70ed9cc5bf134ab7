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

/// The row and slab of this warp.
struct Unit {
  int64_t row, slab;
};
__device__ __forceinline__ Unit unit_of(int64_t slabs) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  return {unit / slabs, unit % slabs};
}

__global__ void quantise_kernel(const __grid_constant__ QuantiseSm90Params p) {
  const Unit at = unit_of(p.in / 128);
  wait_for_previous();
  launch_dependents();
  if (at.row >= p.x_groups * 8) return;
  float4 v = make_float4(0, 0, 0, 0);
  if (at.row < p.rows) {
    const int64_t from = p.source != nullptr ? p.source[at.row] : at.row;
    if (from >= 0) {
      v = load4(static_cast<const __nv_bfloat16*>(p.x) + from * p.stride + at.slab * 128 +
                threadIdx.x % 32 * 4);
    }
  }
  store_quantised(v, at.row, at.slab, p.codes, p.scales, p.x_groups);
}

__global__ void swiglu_quantise_kernel(const __grid_constant__ SwigluQuantiseSm90Params p) {
  const Unit at = unit_of(p.inter / 128);
  wait_for_previous();
  launch_dependents();
  if (at.row >= p.x_groups * 8) return;
  float4 h = make_float4(0, 0, 0, 0);
  if (at.row < p.rows) {
    const __nv_bfloat16* row = static_cast<const __nv_bfloat16*>(p.gate_up) + at.row * 2 * p.inter +
                               at.slab * 128 + threadIdx.x % 32 * 4;
    const float4 g = load4(row), u = load4(row + p.inter);
    const float w = p.weight != nullptr ? p.weight[at.row] : 1.0f;
    const auto one = [&](float gate, float up) {
      return round_to<__nv_bfloat16>(swiglu_exact(gate, up, w, p.limit));
    };
    h = make_float4(one(g.x, u.x), one(g.y, u.y), one(g.z, u.z), one(g.w, u.w));
  }
  store_quantised(h, at.row, at.slab, p.codes, p.scales, p.x_groups);
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

/// A grid of warps, one for every row and slab, that may start beside the kernel before it.
template <typename Params>
void launch_units(
    void (*kernel)(Params), const Params& p, int64_t units, Stream stream, const char* name) {
  if (units == 0) return;
  launch_early(kernel, {blocks_for(units, 4), 128}, stream, name, p);
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
