// Shares of masters and moments: even, cut nowhere inside a matrix, and as many matrices a rank as
// the report has, for the released models.
#include "train/zero_plan.h"

#include <algorithm>
#include <iostream>
#include <numeric>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/presets.h"
#include "train/train_plan.h"

namespace hadal::train {
namespace {

TEST(ZeroPlan, FillsBucketsEvenlyAndCutsNothing) {
  // Many matrices of a few sizes, as models have them.
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < 200; ++i) sizes.push_back(i % 5 == 0 ? 900 : 100 + i % 3);
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  for (const int64_t ranks : {1, 2, 3, 8, 16}) {
    std::vector<int64_t> loads, found(static_cast<size_t>(ranks), 0);
    const std::vector<int64_t> buckets = fill_buckets(sizes, ranks, loads);
    for (size_t i = 0; i < sizes.size(); ++i) found[static_cast<size_t>(buckets[i])] += sizes[i];
    EXPECT_EQ(found, loads);
    const int64_t most = *std::max_element(loads.begin(), loads.end());
    EXPECT_LE(static_cast<double>(most), 1.05 * static_cast<double>(total / ranks));
  }
}

/// Every element once, in order, no unit cut, and the first group's loads those of the pieces.
void check_pieces(const std::vector<PlanItem>& items, const ZeroPlan& plan) {
  std::array<std::vector<int64_t>, kNumPools> loads;
  for (auto& each : loads) each.assign(static_cast<size_t>(plan.ranks), 0);
  size_t next = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    int64_t place = 0;
    for (; next < plan.pieces.size() && plan.pieces[next].item == i; ++next) {
      const PlanPiece& piece = plan.pieces[next];
      ASSERT_EQ(piece.begin, place);
      ASSERT_GT(piece.size(), 0);
      ASSERT_EQ(piece.begin % items[i].unit, 0);
      ASSERT_TRUE(piece.owner >= 0 && piece.owner < plan.ranks);
      place = piece.end;
      loads[static_cast<size_t>(pool_of(items[i].share))][static_cast<size_t>(piece.owner)] +=
          piece.size();
    }
    ASSERT_EQ(place, items[i].elements);
  }
  ASSERT_EQ(next, plan.pieces.size());
  const int64_t first_group = group_ranks(plan.ranks, plan.groups, 0)[1];
  for (size_t pool = 0; pool < kNumPools; ++pool) {
    const int64_t end = pool == static_cast<size_t>(Pool::kDense) ? first_group : plan.ranks;
    for (int64_t rank = 0; rank < end; ++rank)
      ASSERT_EQ(loads[pool][static_cast<size_t>(rank)],
                plan.loads[pool][static_cast<size_t>(rank)]);
  }
}

/// Owners along the line of down, up and gate matrices of all layers only grow.
void check_expert_line(const std::vector<PlanItem>& items, const ZeroPlan& plan) {
  int64_t owner = 0;
  for (const Share share : {Share::kDown, Share::kUp, Share::kGate}) {
    for (const PlanPiece& piece : plan.pieces) {
      if (items[piece.item].share != share) continue;
      ASSERT_GE(piece.owner, owner);
      owner = piece.owner;
    }
  }
  EXPECT_EQ(owner, plan.ranks - 1);
}

void check_released(const std::string& name,
                    const model::ModelConfig& config,
                    double dense_elements,
                    int64_t cap) {
  const std::vector<PlanItem> items = plan_items(config);
  EXPECT_EQ(dense_cap(items), cap);
  double dense = 0.0;
  for (const PlanItem& item : items)
    if (item.share == Share::kDense) dense += static_cast<double>(item.elements);
  EXPECT_NEAR(dense / dense_elements, 1.0, 0.01);
  for (const int64_t ranks :
       {int64_t{8}, int64_t{16}, int64_t{32}, int64_t{64}, int64_t{96}, int64_t{128}, cap,
        int64_t{192}, int64_t{256}, int64_t{384}, int64_t{500}, int64_t{512}}) {
    SCOPED_TRACE(concat(name, " on ", ranks, " ranks"));
    const ZeroPlan plan = plan_zero(items, ranks, cap);
    EXPECT_EQ(plan, plan_zero(items, ranks, cap));
    check_pieces(items, plan);
    check_expert_line(items, plan);
    EXPECT_LT(plan.padding(Pool::kDense), 0.10);
    EXPECT_LT(plan.padding(Pool::kExperts), 0.01);
    EXPECT_LT(plan.padding(Pool::kElements), 0.01);
    if (ranks == cap) {
      EXPECT_LE(plan.mean_dense_matrices(), 5.0);
    }
    std::cout << name << ", " << ranks << " ranks: " << plan.groups
              << " groups, dense matrices a rank " << plan.mean_dense_matrices() << " on average, "
              << plan.most_dense_matrices() << " at most; padding dense "
              << 100 * plan.padding(Pool::kDense) << " %, experts "
              << 100 * plan.padding(Pool::kExperts) << " %\n";
  }
}

TEST(ZeroPlan, FlashIsSharedEvenlyOn8To512Ranks) {
  check_released("V4-Flash", model::deepseek_v4_flash(), 6.4e9, 191);
}

TEST(ZeroPlan, ProIsSharedEvenlyOn8To512Ranks) {
  check_released("V4-Pro", model::deepseek_v4_pro(), 24.2e9, 206);
}

// Beyond the cap every group has all dense matrices; experts and elements are shared by all ranks.
TEST(ZeroPlan, GroupsBeyondTheCapHoldTheSame) {
  const std::vector<PlanItem> items = plan_items(model::deepseek_v4_flash());
  const int64_t ranks = 500, cap = 190;
  const ZeroPlan plan = plan_zero(items, ranks, cap);
  ASSERT_EQ(plan.groups, 3);
  int64_t next = 0;
  for (int64_t group = 0; group < plan.groups; ++group) {
    const auto [begin, end] = group_ranks(ranks, plan.groups, group);
    EXPECT_EQ(begin, next);
    EXPECT_LE(end - begin, cap);
    next = end;
    int64_t elements = 0, matrices = 0;
    for (int64_t rank = begin; rank < end; ++rank) {
      elements += plan.loads[static_cast<size_t>(Pool::kDense)][static_cast<size_t>(rank)];
      matrices += plan.dense_matrices[static_cast<size_t>(rank)];
    }
    int64_t all = 0, count = 0;
    for (const PlanItem& item : items) {
      if (item.share != Share::kDense) continue;
      all += item.elements;
      ++count;
    }
    EXPECT_EQ(elements, all);
    EXPECT_GE(matrices, count);
  }
  EXPECT_EQ(next, ranks);
}

TEST(ZeroPlan, OneRankOwnsEveryParameterInOnePiece) {
  const std::vector<PlanItem> items = plan_items(model::deepseek_v4_flash());
  EXPECT_EQ(plan_zero(items, 1, dense_cap(items)).pieces.size(), items.size());
}

TEST(TrainPlan, MemoryFallsWithTheRanksAndSumsAreThoseOfTheShapes) {
  const model::ModelConfig config = model::deepseek_v4_flash();
  TrainPlanParams params{.step_tokens = int64_t{1} << 26,
                         .row_length = 4096,
                         .flops_per_second = 4e14,
                         .bytes_per_second = 5e10};
  const TrainPlan one = make_train_plan(config, params);
  EXPECT_EQ(one.fullest.masters, 0.0);
  EXPECT_EQ(one.gradients_received, 0.0);
  double before = one.fullest.weights + one.fullest.moments;
  for (const int64_t ranks : {2, 8, 64, 512}) {
    params.ranks = ranks;
    const TrainPlan plan = make_train_plan(config, params);
    const RankMemory& memory = plan.fullest;
    const double now = memory.weights + memory.masters + memory.moments;
    EXPECT_LT(now, before);
    before = now;
    // Nearly all is Muon's and rounded: four bytes of each are the owner's.
    const double share = 4 * plan.elements / static_cast<double>(ranks);
    EXPECT_NEAR(memory.masters / share, 1.0, 0.08);
    EXPECT_NEAR(memory.moments / share, 1.0, 0.08);
    EXPECT_NEAR(memory.weights / (2 * plan.elements), 1.0, 0.01);
    // Each element's nodes go to one owner.
    EXPECT_LE(plan.gradients_sent, 4 * plan.elements);
    EXPECT_GT(plan.step_seconds(), plan.pass_seconds);
  }
}

}  // namespace
}  // namespace hadal::train
