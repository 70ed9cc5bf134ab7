// Ops that are one kernel on a GPU where they are several elsewhere: the bits of those, one after
// the other.
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/attention/heads.h"
#include "ops/attention/rope.h"
#include "ops/cache/sm90_rows.h"
#include "ops/compressor/compress.h"
#include "ops/gemm/normalised_input.h"
#include "ops/gemm/product_input.h"
#include "ops/indexer/hadamard.h"
#include "ops/moe/sm90_experts.h"
#include "ops/moe/swiglu.h"
#include "ops/norm/rms_norm.h"
#include "ops/quant/round_trip.h"
#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

using testing::make_fp8;
using testing::same_bits;

at::Tensor low(const at::Tensor& x) { return x.to(at::kBFloat16); }
at::Tensor angles(int64_t rows) {
  const at::Tensor angle = at::randn({rows, 32});
  return at::stack({angle.cos(), angle.sin()}, -1).to(at::kCUDA);
}

class FusedRowsGpu : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "no CUDA device";
    at::manual_seed(11);
  }
  int64_t rows() const { return GetParam(); }
};

TEST_P(FusedRowsGpu, NormsAndRotatesHeads) {
  for (const int64_t width : {128, 512}) {
    const at::Tensor q = low(at::randn({rows(), 8, width}) * 2).to(at::kCUDA), cs = angles(rows());
    EXPECT_TRUE(same_bits(norm_rotate_heads(q, 1e-6, Numerics::kReleased, cs).cpu(),
                          rope(head_norm(q, 1e-6, Numerics::kReleased), cs).cpu()));
  }
}

TEST_P(FusedRowsGpu, RotatesResultsIntoTheirProduct) {
  const auto a = make_fp8(128, 1024, 5), b = make_fp8(128, 1024, 6);
  const Weight w = Weight(*pack_sm90_widened({a.data, b.data}, {a.scale, b.scale})).to(at::kCUDA);
  const at::Tensor x = low(at::randn({rows(), 4, 512})).to(at::kCUDA), cs = angles(rows());
  EXPECT_TRUE(same_bits(rotated_group_linear(x, cs, w).cpu(),
                        group_linear(rope(x, cs, true).reshape({rows(), 2, 1024}), w).cpu()));
}

TEST_P(FusedRowsGpu, MakesCachedRows) {
  const at::Tensor cs = angles(rows());
  const at::Tensor numbers = at::randperm(rows() + 5).narrow(0, 0, rows()).to(at::kCUDA);
  for (const RowFormat format : {RowFormat{.kind = RowKind::kLatent, .width = 512, .rotary = 64},
                                 RowFormat{.kind = RowKind::kLatent, .width = 128, .rotary = 64},
                                 RowFormat{.kind = RowKind::kIndexKey, .width = 128}}) {
    const at::Tensor x = low(at::randn({rows(), format.width}) * 2).to(at::kCUDA),
                     weight = at::randn({format.width}).to(at::kCUDA);
    ASSERT_TRUE(serves_cache_rows_sm90(x, cs, format));
    at::Tensor chain = rope(rms_norm(x, weight, 1e-6), cs);
    chain = format.kind == RowKind::kIndexKey
                ? fp4_round_trip(hadamard(chain), 32)
                : fp8_round_trip_leading(chain, format.width - 64, 64);
    const auto bytes = at::TensorOptions(at::kCUDA).dtype(at::kByte);
    const at::Tensor wanted = at::zeros({rows() + 5, format.bytes()}, bytes),
                     found = at::zeros({rows() + 5, format.bytes()}, bytes);
    wanted.index_copy_(0, numbers, pack_rows(chain, format));
    cache_rows_sm90({.x = x, .weight = weight, .eps = 1e-6, .cos_sin = cs}, format, numbers, found);
    EXPECT_TRUE(at::equal(found, wanted)) << format.width;
    const at::Tensor beside = rows_in_step_with(found, rows());
    cache_rows_sm90({.x = x, .weight = weight, .eps = 1e-6, .cos_sin = cs}, format, at::Tensor(),
                    beside);
    EXPECT_TRUE(at::equal(beside, wanted.index_select(0, numbers)));
    const int64_t apart = static_cast<const uint8_t*>(beside.const_data_ptr()) -
                          static_cast<const uint8_t*>(found.const_data_ptr());
    EXPECT_EQ(apart % format.bytes(), 0);
  }
}

TEST_P(FusedRowsGpu, MakesIndexQueries) {
  const RowFormat format{.kind = RowKind::kIndexKey, .width = 128};
  const at::Tensor q = low(at::randn({rows(), 16, 128})).to(at::kCUDA), cs = angles(rows());
  const at::Tensor chain = fp4_round_trip(hadamard(rope(q, cs)), 32);
  EXPECT_TRUE(at::equal(index_queries_sm90(q, cs).flatten(0, 1),
                        pack_rows(chain.reshape({rows() * 16, 128}), format)));
}

TEST_P(FusedRowsGpu, RoundsRowsOnceForSeveralProducts) {
  const auto a = make_fp8(192, 512, 5), b = make_fp8(64, 512, 6);
  const Weight first = Weight(*pack_sm90_fp8({a.data}, {a.scale})).to(at::kCUDA),
               second = Weight(*pack_sm90_fp8({b.data}, {b.scale})).to(at::kCUDA),
               third = Weight(*pack_sm90_bf16(low(at::randn({96, 512})))).to(at::kCUDA);
  const at::Tensor x =
      low(at::randn({rows(), 512}) * at::exp(at::randn({rows(), 1}))).to(at::kCUDA);
  const ProductInput input(x, Numerics::kReleased);
  const at::Tensor rounded = quantise_input(x, GemmRole::kFp8, Numerics::kReleased);
  for (const Weight* w : {&first, &second})
    EXPECT_TRUE(same_bits(linear(input, *w, GemmRole::kFp8).cpu(),
                          linear(rounded, *w, GemmRole::kFp8).cpu()));
  for (const GemmRole role : {GemmRole::kFp32, GemmRole::kBf16})
    EXPECT_TRUE(same_bits(linear(input, third, role).cpu(), linear(x, third, role).cpu()));
  const auto both = linear(input, {{first, GemmRole::kFp8}, {second, GemmRole::kFp8}});
  EXPECT_TRUE(same_bits(both[0].cpu(), linear(rounded, first, GemmRole::kFp8).cpu()));
  EXPECT_TRUE(same_bits(both[1].cpu(), linear(rounded, second, GemmRole::kFp8).cpu()));
  const auto wide = linear(input, {{third, GemmRole::kFp32}, {third, GemmRole::kBf16}});
  for (const GemmRole role : {GemmRole::kFp32, GemmRole::kBf16})
    EXPECT_TRUE(
        same_bits(wide[role == GemmRole::kFp32 ? 0 : 1].cpu(), linear(x, third, role).cpu()));
}

TEST_P(FusedRowsGpu, NormsMakeTheOperandsOfProducts) {
  const auto a = make_fp8(192, 512, 5);
  const Weight codes = Weight(*pack_sm90_fp8({a.data}, {a.scale})).to(at::kCUDA),
               wide = Weight(*pack_sm90_bf16(low(at::randn({96, 512})))).to(at::kCUDA);
  const at::Tensor x = low(at::randn({rows(), 512}) * 3).to(at::kCUDA),
                   weight = at::randn({512}).to(at::kCUDA);
  const at::Tensor normed = rms_norm(x, weight, 1e-6);
  const ProductInput plain(normed, Numerics::kReleased);
  for (const OperandKinds kinds : {OperandKinds{}, {.bf16 = false}, {.codes = false}}) {
    const ProductInput input = normalised_input(x, weight, 1e-6, Numerics::kReleased, kinds);
    EXPECT_TRUE(same_bits(input.x().cpu(), normed.cpu()));
    EXPECT_TRUE(same_bits(linear(input, codes, GemmRole::kFp8).cpu(),
                          linear(plain, codes, GemmRole::kFp8).cpu()));
    EXPECT_TRUE(same_bits(linear(input, wide, GemmRole::kFp32).cpu(),
                          linear(plain, wide, GemmRole::kFp32).cpu()));
    // Padding included.
    if (kinds.codes) {
      EXPECT_TRUE(at::equal(input.codes().codes, plain.codes().codes));
      EXPECT_TRUE(at::equal(input.codes().scales, plain.codes().scales));
    }
    if (kinds.bf16) {
      EXPECT_TRUE(at::equal(input.bf16_operand().codes, plain.bf16_operand().codes));
    }
  }
}

TEST_P(FusedRowsGpu, RunsTheSharedExpert) {
  const auto a = make_fp8(256, 512, 5), b = make_fp8(256, 512, 6), c = make_fp8(512, 256, 7);
  const Weight w1 = Weight(*pack_sm90_fp8({a.data}, {a.scale})).to(at::kCUDA),
               w3 = Weight(*pack_sm90_fp8({b.data}, {b.scale})).to(at::kCUDA),
               w2 = Weight(*pack_sm90_fp8({c.data}, {c.scale})).to(at::kCUDA);
  const at::Tensor x = low(at::randn({rows(), 512}) * 0.05).to(at::kCUDA);
  const ProductInput input(x, Numerics::kReleased);
  const RoutedExperts shared{.w1 = w1, .w3 = w3, .w2 = w2, .swiglu_limit = 1.0};
  ASSERT_TRUE(serves_shared_expert_sm90(input, shared));
  const at::Tensor hidden = swiglu(linear(input, w1, GemmRole::kFp8),
                                   linear(input, w3, GemmRole::kFp8), at::Tensor(), 1.0);
  EXPECT_TRUE(
      same_bits(shared_expert_on_sm90(input, shared).cpu(),
                linear(ProductInput(hidden, Numerics::kReleased), w2, GemmRole::kFp8).cpu()));
}

TEST_P(FusedRowsGpu, KeepsTheCompressorsRows) {
  for (const int64_t ratio : {4, 128}) {
    const int64_t width = ratio == 4 ? 256 : 128, size = 2 * ratio + 8, slots = 3;
    const at::Device gpu = at::kCUDA;
    const at::Tensor kv = at::randn({rows(), width}).to(gpu),
                     gate = at::randn({rows(), width}).to(gpu),
                     ape = at::randn({ratio, width}).to(gpu);
    RingView kv_ring = RingView::of_slots(at::randn({slots * size, width}), {2}, size),
             score_ring = RingView::of_slots(at::randn({slots * size, width}), {2}, size);
    for (RingView* ring : {&kv_ring, &score_ring}) {
      ring->rows = ring->rows.to(gpu);
      ring->slots = ring->slots.to(gpu);
    }
    const Batch batch({rows()}, {77}, gpu, {.slots = {2}});
    const RingWrites& writes = batch.ring_writes(size);
    ASSERT_TRUE(serves_keep_rows_sm90(kv, kv_ring, score_ring, Numerics::kReleased));
    const Compressed whole =
        compress(kv, gate, ape, kv_ring, score_ring, batch, ratio, Numerics::kReleased);
    const at::Tensor kv_wanted =
        kv_ring.rows.clone().index_copy_(0, writes.to, kv.index_select(0, writes.from));
    const at::Tensor score_wanted =
        score_ring.rows.clone().index_copy_(0, writes.to, whole.score.index_select(0, writes.from));
    const Compressed pooled =
        compress(kv, gate, ape, kv_ring, score_ring, batch, ratio, Numerics::kReleased, false);
    EXPECT_FALSE(pooled.score.defined());
    EXPECT_TRUE(same_bits(pooled.pooled.cpu(), whole.pooled.cpu()));
    keep_rows_on_sm90(kv, gate, ape, kv_ring, score_ring, batch, ratio, writes);
    EXPECT_TRUE(same_bits(kv_ring.rows.cpu(), kv_wanted.cpu()));
    EXPECT_TRUE(same_bits(score_ring.rows.cpu(), score_wanted.cpu()));
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, FusedRowsGpu, ::testing::Values(1, 5, 64, 300));

}  // namespace
}  // namespace hadal::ops
