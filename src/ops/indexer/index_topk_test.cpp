#include "ops/indexer/index_topk.h"

#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/indexer/index_scores.h"
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
  const BlockView view = BlockView::consecutive(keys, {0, 12});
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
