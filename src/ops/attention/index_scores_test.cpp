#include "ops/attention/index_scores.h"

#include <cmath>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

/// The chosen blocks of a token, without the -1 tail, which is checked to be one.
std::vector<int64_t> chosen(const at::Tensor& selection, int64_t token) {
  std::vector<int64_t> blocks;
  bool ended = false;
  for (int64_t i = 0; i < selection.size(1); ++i) {
    const int64_t block = selection[token][i].item<int64_t>();
    EXPECT_FALSE(ended && block >= 0) << "a block after -1";
    ended |= block < 0;
    if (block >= 0) blocks.push_back(block);
  }
  return blocks;
}

BlockView all_of(const at::Tensor& rows) { return {.rows = rows, .page_start = {{0}}}; }

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
  const BlockView pages{.rows = keys, .page_start = {{12, 0, 4}}, .page_blocks = 4};
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

TEST(SelectTopk, AgreesWithSortingByScoreThenIndex) {
  at::manual_seed(5);
  // Coarse scores, so that ties are everywhere.
  const Batch batch({40, 31}, {0, 0}, at::kCPU);
  const at::Tensor limit = (batch.pos() + 1).div(4, "floor").unsqueeze(1);
  const at::Tensor scores =
      at::randint(4, {71, 10})
          .to(at::kFloat)
          .masked_fill(at::arange(10, at::kLong).unsqueeze(0) >= limit, -INFINITY);
  const at::Tensor selection = select_topk(scores, batch, 4, 3);
  for (int64_t token = 0; token < 71; ++token) {
    const int64_t visible = (batch.host_pos()[static_cast<size_t>(token)] + 1) / 4;
    std::vector<int64_t> order(static_cast<size_t>(visible));
    for (int64_t i = 0; i < visible; ++i) order[static_cast<size_t>(i)] = i;
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      const double x = scores[token][a].item<double>(), y = scores[token][b].item<double>();
      return x > y || (x == y && a < b);
    });
    order.resize(std::min<size_t>(order.size(), 3));
    std::sort(order.begin(), order.end());
    EXPECT_EQ(chosen(selection, token), order) << token;
  }
}

TEST(SelectTopk, TiesGoToTheLowerBlockAndNanIsLowest) {
  const Batch batch({1}, {23}, at::kCPU);  // sees 6 blocks
  const auto pick = [&](std::vector<double> scores, int64_t k) {
    return chosen(select_topk(at::tensor(scores).reshape({1, 6}), batch, 4, k), 0);
  };
  EXPECT_EQ(pick({1, 2, 2, 2, 1, 2}, 3), (std::vector<int64_t>{1, 2, 3}));
  EXPECT_EQ(pick({1, 1, 1, 1, 1, 1}, 2), (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(pick({NAN, -5, NAN, 3, -7, NAN}, 3), (std::vector<int64_t>{1, 3, 4}));
  EXPECT_EQ(pick({NAN, -5, NAN, 3, -7, NAN}, 5), (std::vector<int64_t>{0, 1, 2, 3, 4}));
  EXPECT_EQ(pick({0.0, -0.0, 0.0, -0.0, -1, -1}, 3), (std::vector<int64_t>{0, 1, 2}));
}

TEST(SelectTopk, FewBlocksAreAllTakenAndTheTailIsMinusOne) {
  const Batch batch({9}, {0}, at::kCPU);
  const at::Tensor selection = select_topk(at::zeros({9, 2}), batch, 4, 5);
  EXPECT_EQ(selection.size(1), 5);
  for (int64_t p = 0; p < 9; ++p) {
    EXPECT_EQ(static_cast<int64_t>(chosen(selection, p).size()), (p + 1) / 4) << p;
  }
}

// The kernel chooses while it scores; scoring first and choosing then is the same.
TEST(IndexTopk, IsSelectionOfTheScores) {
  at::manual_seed(6);
  const Batch batch({50, 21}, {0, 0}, at::kCPU);
  const at::Tensor q = at::randn({71, 2, 16}).to(at::kBFloat16),
                   w = at::randn({71, 2}).to(at::kBFloat16),
                   keys = at::randn({17, 16}).to(at::kBFloat16);
  const BlockView view{.rows = keys, .page_start = {{0}, {12}}};
  for (const Numerics numerics : {Numerics::kBf16, Numerics::kReleased}) {
    const auto call = [&](const Tensors& in) {
      return Tensors{index_topk(in[0], in[1], view, batch, 4, 4, numerics)};
    };
    const at::Tensor found = testing::expect_machine_independent(call, {q, w})[0];
    EXPECT_TRUE(
        at::equal(found, select_topk(index_scores(q, w, view, batch, 4, numerics), batch, 4, 4)));
  }
}

}  // namespace
}  // namespace hadal::ops
