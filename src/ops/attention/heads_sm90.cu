// Half a warp a head of a token.
#include "ops/attention/heads_sm90.h"
#include "ops/cache/rows_sm90.h"
#include "ops/cuda/half_rows.cuh"
#include "ops/cuda/sm90.cuh"
#include "ops/gemm/sm90_layout.h"

namespace hadal::ops::cuda {
namespace {

constexpr int kRotary = static_cast<int>(kRotaryDim);

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

/// In pieces of 16 bytes, as the operand has them: neighbouring lanes, neighbouring pieces.
template <int kPer>
__global__ void __launch_bounds__(kHalfRowThreads)
    head_operand_kernel(const __grid_constant__ HeadOperandSm90Params p) {
  constexpr int kPieces = kPer * 2, kTurned = kRotary / 8;
  const int64_t row = row_of_half(), token = row / p.heads, head = row % p.heads;
  wait_for_previous();
  launch_dependents();
  if (token >= p.x_groups * 8) return;
  const int64_t each = p.heads / p.groups, bytes = each * kPer * 32;
  uint8_t* operand = p.operand + head / each * ((bytes + 127) / 128) * p.x_groups * 1024;
  const auto* turns = reinterpret_cast<const float2*>(p.cos_sin + token * kRotary);
#pragma unroll
  for (int piece = lane_of_half(); piece < kPieces; piece += 16) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (token < p.tokens) v = reinterpret_cast<const uint4*>(p.x + row * kPer * 16)[piece];
    if (token < p.tokens && piece >= kPieces - kTurned) {
      uint32_t* pairs = &v.x;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 turn = turns[(piece - (kPieces - kTurned)) * 4 + i];
        float even = __uint_as_float(pairs[i] << 16);
        float odd = __uint_as_float(pairs[i] & 0xffff0000u);
        rotate_pair(even, odd, make_float2(turn.x, -turn.y));
        pairs[i] = __float_as_uint(even) >> 16 | __float_as_uint(odd);  // both are BF16 values
      }
    }
    const int64_t k = head % each * kPer * 32 + piece * 16;
    *reinterpret_cast<uint4*>(operand + sm90::operand_offset(token, k, p.x_groups)) = v;
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
