#include "engine_core/draft_policy.h"

#include <gtest/gtest.h>

namespace hadal::engine {
namespace {

TEST(DraftPolicy, LengthFollowsAcceptanceAndCost) {
  DraftPolicy good;
  for (int i = 0; i < 50; ++i) good.add(4, 4);
  EXPECT_GT(good.acceptance(), 0.95);
  EXPECT_EQ(good.length(4, 0.1), 4);
  EXPECT_EQ(good.length(2, 0.1), 2);
  EXPECT_EQ(good.length(4, 1.0), 0) << "a draft costs as much as the token it saves";
  DraftPolicy fair;
  for (int i = 0; i < 200; ++i) fair.add(1, i % 2);
  const int64_t length = fair.length(8, 0.15);
  EXPECT_GT(length, 0);
  EXPECT_LT(length, 8);
}

TEST(DraftPolicy, StopsWhereItDoesNotPayAndLooksAgain) {
  DraftPolicy policy;
  for (int i = 0; i < 50; ++i) policy.add(1, 0);
  int64_t drafts = 0;
  for (int64_t i = 0; i < 4 * DraftPolicy::kProbe; ++i) drafts += policy.length(4, 0.2);
  EXPECT_EQ(drafts, 4);
  // What it finds then can turn it on.
  for (int i = 0; i < 30; ++i) policy.add(1, 1);
  EXPECT_GT(policy.length(4, 0.2), 0);
  EXPECT_EQ(policy.length(0, 0.2), 0);
}

TEST(StepCost, FitsALineOverRows) {
  StepCost cost;
  EXPECT_GT(cost.draft_cost(1), 0);
  // 10 ms and 1 ms a row; a draft takes 0.5 ms.
  for (int64_t i = 0; i < 400; ++i) {
    const int64_t drafts = i % 4;
    cost.add(2 * (1 + drafts), 0.010 + 0.002 * static_cast<double>(1 + drafts), 2 * drafts,
             0.0005 * static_cast<double>(2 * drafts));
  }
  EXPECT_NEAR(cost.draft_cost(2), 2 * 0.0015 / 0.012, 1e-3);
  EXPECT_NEAR(cost.draft_cost(8), 8 * 0.0015 / 0.018, 1e-3);
}

}  // namespace
}  // namespace hadal::engine
