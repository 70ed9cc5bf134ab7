// Half a warp a head of a token.
#include "ops/attention/heads_sm90.h"
#include "ops/cuda/half_rows.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kRotary = 64;

template <int kPer, bool kNorm>
__global__ void __launch_bounds__(kHalfRowThreads)
    head_rows_kernel(const __grid_constant__ HeadRowsSm90Params p) {
  const int64_t rows = p.tokens * p.heads, row = row_of_half(), from = min(row, rows - 1);
  wait_for_previous();
  launch_dependents();
  float v[kPer];
  load_dealt(v, p.x + from * kPer * 16);
  if constexpr (kNorm) {
    const float root = inverse_root<true>(v, p.eps);
#pragma unroll
    for (int j = 0; j < kPer; ++j) v[j] = round_to<__nv_bfloat16>(v[j] * root);
  }
  rotate_dealt<kRotary>(v, p.cos_sin + from / p.heads * kRotary, p.inverse ? -1.0f : 1.0f);
  if (row < rows) store_dealt(v, p.out + row * kPer * 16);
}

/// In pieces, so that a lane has whole pieces of 16 bytes of the operand (of 64 channels: half).
template <int kPer>
__global__ void __launch_bounds__(kHalfRowThreads)
    head_operand_kernel(const __grid_constant__ HeadOperandSm90Params p) {
  const int64_t row = row_of_half(), token = row / p.heads, head = row % p.heads;
  wait_for_previous();
  launch_dependents();
  if (token >= p.x_groups * 8) return;
  float v[kPer] = {};
  if (token < p.tokens) {
    load_piece(v, p.x + row * kPer * 16);
    const float* cos_sin = p.cos_sin + token * kRotary;
    rotate_piece<kRotary, true>(v, cos_sin);
  }
  const int64_t each = p.heads / p.groups, bytes = each * kPer * 32;
  uint8_t* operand = p.operand + head / each * ((bytes + 127) / 128) * p.x_groups * 1024;
  const int64_t k = head % each * kPer * 32 + lane_of_half() * kPer * 2;
#pragma unroll
  for (int j = 0; j < kPer; j += 4) {
    store4(reinterpret_cast<__nv_bfloat16*>(operand +
                                            sm90::operand_offset(token, k + j * 2, p.x_groups)),
           make_float4(v[j], v[j + 1], v[j + 2], v[j + 3]));
  }
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void head_rows_sm90(const HeadRowsSm90Params& p, Stream stream) {
  if (p.tokens * p.heads == 0) return;
  cuda::by_width(p.width, "head_rows_sm90", [&](auto per) {
    auto* kernel = p.norm ? cuda::head_rows_kernel<per, true> : cuda::head_rows_kernel<per, false>;
    cuda::launch_early(kernel, cuda::half_row_shape(p.tokens * p.heads), stream, "head_rows_sm90",
                       p);
  });
}

void head_operand_sm90(const HeadOperandSm90Params& p, Stream stream) {
  if (p.x_groups == 0) return;
  if (p.heads % p.groups != 0 || p.heads / p.groups * p.width % 64 != 0)
    throw_kernel_error("head_operand_sm90", "groups of a multiple of 64 channels");
  cuda::by_width(p.width, "head_operand_sm90", [&](auto per) {
    cuda::launch_early(cuda::head_operand_kernel<per>,
                       cuda::half_row_shape(p.x_groups * 8 * p.heads), stream, "head_operand_sm90",
                       p);
  });
}

}  // namespace hadal::ops
