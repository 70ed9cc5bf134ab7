// The twins of fused kernels against the ops one after the other.
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/attention/heads_sm90.h"
#include "ops/attention/rope.h"
#include "ops/cache/kv_rows.h"
#include "ops/cache/rows_sm90.h"
#include "ops/compressor/compress_sm90.h"
#include "ops/gemm/operand_twin.h"
#include "ops/indexer/hadamard.h"
#include "ops/norm/rms_norm.h"
#include "ops/quant/round_trip.h"
#include "ops/sm90.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using testing::same_bits;

at::Tensor bf16(at::IntArrayRef shape) { return at::randn(shape).to(at::kBFloat16); }
at::Tensor rotations(int64_t rows) {
  const at::Tensor angle = at::randn({rows, kRotaryDim / 2});
  return at::stack({angle.cos(), angle.sin()}, -1).contiguous();
}
/// Rows of bytes of which every third lies nowhere and the others in reverse.
struct Places {
  std::vector<int64_t> of;
  explicit Places(int64_t rows) {
    for (int64_t i = 0; i < rows; ++i) of.push_back(i % 3 == 2 ? -1 : rows - 1 - i);
  }
  at::Tensor apply(const at::Tensor& packed) const {
    at::Tensor out = at::zeros_like(packed);
    for (size_t i = 0; i < of.size(); ++i)
      if (of[i] >= 0) out[of[i]].copy_(packed[static_cast<int64_t>(i)]);
    return out;
  }
};

TEST(RowsTwin, LatentsAreTheOpsOneAfterTheOther) {
  at::manual_seed(3);
  const int64_t rows = 37, width = 192;
  const RowFormat format{.kind = RowKind::kLatent, .width = width, .rotary = kRotaryDim};
  const at::Tensor wide = bf16({rows, width + 8}), x = wide.narrow(1, 4, width).contiguous(),
                   weight = at::randn({width}), cos_sin = rotations(rows);
  const at::Tensor rounded =
      fp8_round_trip_leading(rope(rms_norm(x, weight, 1e-6), cos_sin), width - kRotaryDim, 64);
  const Places places(rows);
  at::Tensor out = at::zeros({rows, format.bytes()}, at::kByte);
  latent_rows_twin({.x = bf16_data(wide) + 4,
                    .weight = weight.const_data_ptr<float>(),
                    .cos_sin = cos_sin.const_data_ptr<float>(),
                    .place = places.of.data(),
                    .out = out.mutable_data_ptr<uint8_t>(),
                    .rows = rows,
                    .width = width,
                    .stride = width + 8,
                    .eps = 1e-6f});
  EXPECT_TRUE(at::equal(out, places.apply(pack_rows(rounded, format))));
}

TEST(RowsTwin, IndexRowsAreTheOpsOneAfterTheOther) {
  at::manual_seed(4);
  const int64_t tokens = 21, heads = 3, rows = tokens * heads;
  const RowFormat format{.kind = RowKind::kIndexKey, .width = 128};
  const at::Tensor x = bf16({tokens, heads, 128}), cos_sin = rotations(tokens);
  const at::Tensor rounded = fp4_round_trip(hadamard(rope(x, cos_sin)), 32);
  const Places places(rows);
  at::Tensor out = at::zeros({rows, format.bytes()}, at::kByte);
  index_rows_twin({.x = bf16_data(x),
                   .weight = nullptr,
                   .cos_sin = cos_sin.const_data_ptr<float>(),
                   .place = places.of.data(),
                   .out = out.mutable_data_ptr<uint8_t>(),
                   .rows = rows,
                   .heads = heads,
                   .eps = 0.0f});
  EXPECT_TRUE(at::equal(out, places.apply(pack_rows(rounded.reshape({rows, 128}), format))));
}

TEST(RowsTwin, HeadsAreTheOpsOneAfterTheOtherAndOperandsOfTheirGroups) {
  at::manual_seed(5);
  const int64_t tokens = 13, heads = 6, width = 128, groups = 3, x_groups = 2;
  const at::Tensor x = bf16({tokens, heads, width}), cos_sin = rotations(tokens);
  at::Tensor out = at::empty_like(x);
  head_rows_twin({.x = bf16_data(x),
                  .cos_sin = cos_sin.const_data_ptr<float>(),
                  .out = mutable_bf16_data(out),
                  .tokens = tokens,
                  .heads = heads,
                  .width = width,
                  .eps = 1e-6f,
                  .norm = true,
                  .inverse = false});
  EXPECT_TRUE(same_bits(out, rope(head_norm(x, 1e-6, Numerics::kReleased), cos_sin)));

  const int64_t values = heads / groups * width, bytes = values * 2 * x_groups * 8;
  std::vector<uint8_t> operand(static_cast<size_t>(groups * bytes), 1);
  head_operand_twin({.x = bf16_data(x),
                     .cos_sin = cos_sin.const_data_ptr<float>(),
                     .operand = operand.data(),
                     .tokens = tokens,
                     .heads = heads,
                     .width = width,
                     .groups = groups,
                     .x_groups = x_groups});
  const at::Tensor expected =
      at::constant_pad_nd(rope(x, cos_sin, /*inverse=*/true).reshape({tokens, groups, values}),
                          {0, 0, 0, 0, 0, x_groups * 8 - tokens});
  for (int64_t group = 0; group < groups; ++group) {
    const auto rows = rows_of_operand(operand.data() + group * bytes, x_groups, 0, x_groups * 8,
                                      values * 2 / 128);
    const at::Tensor found =
        at::from_blob(const_cast<uint8_t*>(rows.data()), {x_groups * 8, values * 2}, at::kByte)
            .view(at::kBFloat16);
    EXPECT_TRUE(same_bits(found, expected.select(1, group).contiguous())) << group;
  }
}

TEST(RowsTwin, RingsKeepValuesAndScores) {
  const int64_t ratio = 4, d = 8, width = 16, stride = 20;
  const at::Tensor kv = at::randn({3, stride}), gate = at::randn({3, stride}),
                   ape = at::randn({ratio, width});
  at::Tensor kv_ring = at::zeros({6, width}), score_ring = at::zeros({6, width});
  const std::vector<int64_t> pos = {5, 6, 7}, from = {2, -1, 0}, to = {4, 0, 1};
  keep_rows_twin({.rows = {.kv = kv.const_data_ptr<float>(),
                           .gate = gate.const_data_ptr<float>(),
                           .ape = ape.const_data_ptr<float>(),
                           .kv_ring = kv_ring.mutable_data_ptr<float>(),
                           .score_ring = score_ring.mutable_data_ptr<float>(),
                           .ring = {},
                           .first_row = nullptr,
                           .pos = pos.data(),
                           .stride = stride,
                           .ratio = ratio,
                           .d = d},
                  .from = from.data(),
                  .to = to.data(),
                  .count = 3});
  at::Tensor kv_wanted = at::zeros_like(kv_ring), score_wanted = at::zeros_like(score_ring);
  for (const auto& [row, place] : {std::pair{2, 4}, {0, 1}}) {
    kv_wanted[place].copy_(kv[row].narrow(0, 0, width));
    score_wanted[place].copy_(gate[row].narrow(0, 0, width) +
                              ape[pos[static_cast<size_t>(row)] % ratio]);
  }
  EXPECT_TRUE(same_bits(kv_ring, kv_wanted));
  EXPECT_TRUE(same_bits(score_ring, score_wanted));
}

}  // namespace
}  // namespace hadal::ops
