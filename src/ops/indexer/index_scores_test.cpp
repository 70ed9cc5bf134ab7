#include "ops/indexer/index_scores.h"

#include <cmath>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

BlockView all_of(const at::Tensor& rows) { return BlockView::consecutive(rows, {0}); }

TEST(IndexScores, VisibleWhenTheLastTokenOfABlockIsReached) {
  const Batch batch({13}, {0}, at::kCPU);
  const at::Tensor scores = index_scores(at::ones({13, 1, 2}), at::ones({13, 1}),
                                         all_of(at::ones({3, 2})), batch, 4, Numerics::kIdeal);
  ASSERT_EQ(scores.size(1), 3);
  for (int64_t p = 0; p < 13; ++p) {
    for (int64_t c = 0; c < 3; ++c) {
      EXPECT_EQ(std::isfinite(scores[p][c].item<double>()), 4 * c + 3 <= p) << p << " " << c;
    }
  }
}

TEST(IndexScores, NegativeProductsDoNotCount) {
  const Batch batch({1}, {3}, at::kCPU);
  const at::Tensor q = at::tensor({1.0, 0.0, -1.0, 0.0}).reshape({1, 2, 2});
  const at::Tensor keys = at::tensor({2.0, 5.0}).reshape({1, 2});
  // Heads see 2 and -2; the weights are 3 and 100.
  const at::Tensor scores = index_scores(q, at::tensor({3.0, 100.0}).reshape({1, 2}), all_of(keys),
                                         batch, 4, Numerics::kIdeal);
  EXPECT_EQ(scores[0][0].item<double>(), 6.0);
  // A negative weight makes a negative score; only the product before it is cut at 0.
  const at::Tensor negative = index_scores(q, at::tensor({-3.0, 100.0}).reshape({1, 2}),
                                           all_of(keys), batch, 4, Numerics::kIdeal);
  EXPECT_EQ(negative[0][0].item<double>(), -6.0);
}

TEST(IndexScores, KernelKeepsTheContract) {
  at::manual_seed(3);
  // A run of a longer sequence: each token sees 9 or 10 blocks, scattered over pages of 4.
  const at::Tensor keys = at::randn({16, 33}), q = at::randn({6, 5, 33}), w = at::randn({6, 5});
  const BlockView pages = BlockView::paged(keys, {{3, 0, 1}}, 4);
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const auto call = [&](const Tensors& in) {
      const Batch batch({6}, {36}, at::kCPU);
      BlockView view = pages;
      view.rows = in[2];
      return Tensors{index_scores(in[0], in[1], view, batch, 4, Numerics::kIdeal)};
    };
    const Tensors inputs = {q.to(type), w.to(type), keys.to(type)};
    const at::Tensor found = testing::expect_machine_independent(call, inputs)[0];
    const at::Tensor exact =
        call({inputs[0].to(at::kDouble), inputs[1].to(at::kDouble), inputs[2].to(at::kDouble)})[0];
    const at::Tensor finite = at::isfinite(exact);
    EXPECT_TRUE(at::equal(at::isfinite(found), finite));
    EXPECT_LT(at::where(finite, found - exact, 0.0).abs().max().item<double>(), 2e-5);
    // Token by token, and contiguous instead of paged: the same bits.
    for (int64_t t = 0; t < 6; ++t) {
      const Batch one({1}, {36 + t}, at::kCPU);
      const at::Tensor order = at::tensor({12, 13, 14, 15, 0, 1, 2, 3, 4, 5}, at::kLong);
      const at::Tensor row =
          index_scores(inputs[0].narrow(0, t, 1), inputs[1].narrow(0, t, 1),
                       all_of(inputs[2].index_select(0, order)), one, 4, Numerics::kIdeal);
      EXPECT_TRUE(testing::same_bits(row[0], found[t].narrow(0, 0, row.size(1)))) << t;
    }
  }
}

// model.md 8: BF16 products, BF16 weighted products, BF16 sum of FP32 sums.
TEST(IndexScores, ReleasedRoundsEachStep) {
  at::manual_seed(4);
  const at::Tensor q = at::randn({3, 4, 32}).to(at::kBFloat16),
                   w = at::randn({3, 4}).to(at::kBFloat16),
                   keys = at::randn({5, 32}).to(at::kBFloat16);
  const Batch batch({3}, {19}, at::kCPU);
  const at::Tensor found =
      index_scores(q, w, all_of(keys), batch, 4, Numerics::kReleased).to(at::kDouble);
  const auto bf16 = [](const at::Tensor& x) { return x.to(at::kBFloat16).to(at::kDouble); };
  const at::Tensor dots = bf16(at::matmul(q.to(at::kDouble), keys.to(at::kDouble).t()));
  const at::Tensor expected =
      bf16(bf16(dots.clamp_min(0.0) * w.to(at::kDouble).unsqueeze(2)).sum(1));
  EXPECT_EQ(found.size(1), 5);
  EXPECT_TRUE(at::equal(found, bf16(found)));
  // FP32 and FP64 sums may round to neighbouring BF16 values: at most one step apart.
  EXPECT_LE(((found - expected).abs() / expected.abs().clamp_min(1e-3)).max().item<double>(),
            0.008);
}

}  // namespace
}  // namespace hadal::ops
