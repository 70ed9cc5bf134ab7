#include "engine_core/schedule/draft_policy.h"

#include <algorithm>

#include <gtest/gtest.h>

namespace hadal::engine_core {
namespace {

/// Steps of one sequence whose drafts cost and are right as told.
struct World {
  DraftPolicy policy;
  DraftAcceptance acceptance;
  double cost = 0.2;
  double drift = 0;  ///< share by which each step takes longer than the one before
  double pace = 0.01;
  double catch_up = 0;  ///< seconds of the first draft after steps without
  bool drafted_before = false;
  int64_t right_of_8 = 6;
  int64_t steps = 0, drafted = 0, tokens = 0;
  double seconds = 0;

  void run(int64_t count, int64_t limit = 1) {
    for (; count > 0; --count, ++steps) {
      policy.begin_step(1);
      const int64_t drafts = policy.length(limit, acceptance.value(policy.acceptance()));
      // Every ninth step is held up by something else.
      const double time =
          pace * (1 + cost * static_cast<double>(drafts)) * (steps % 9 == 0 ? 5 : 1);
      pace *= 1 + drift;
      const double more = drafts > 0 && !drafted_before ? catch_up : 0;
      drafted_before = drafts > 0;
      const int64_t accepted = drafts > 0 && drafted * 5 % 8 < right_of_8 ? 1 : 0;
      policy.end_step(drafts, time + more);
      policy.add(acceptance, drafts, accepted);
      drafted += drafts;
      tokens += 1 + accepted;
      seconds += 0.01 * (1 + cost * static_cast<double>(drafts)) + more;
    }
  }
};

TEST(DraftPolicy, DraftsWhereItPays) {
  World world;
  world.run(4000);
  EXPECT_NEAR(world.policy.cost(), 0.2, 0.02);
  EXPECT_GT(world.drafted, 3600);
  EXPECT_GT(static_cast<double>(world.tokens) * 0.01 / world.seconds, 1.3);
}

TEST(DraftPolicy, AFewTrialsAreEnoughToKnowThatDraftsAreRight) {
  // As hadal-nano alone on two cores: five drafts of six are right and cost six tenths of a step.
  World world;
  world.cost = 0.57;
  world.right_of_8 = 7;
  world.run(1000);
  EXPECT_GT(world.drafted, 900);
}

TEST(DraftPolicy, AMachineThatSlowsDownOrSpeedsUpDoesNotMislead) {
  // Over the steps of a trial by a half, in which drafts would seem to cost 0.9 or 0.2.
  for (const double drift : {0.02, -0.02}) {
    World world;
    world.cost = 0.5;
    world.drift = drift;
    world.run(40);
    EXPECT_NEAR(world.policy.cost(), 0.5, 0.06) << drift;
  }
}

TEST(DraftPolicy, ASequenceWhoseDraftsWereWrongForAWhileIsTriedAgain) {
  World world;
  world.cost = 0.3;
  world.run(500);
  world.right_of_8 = 0;
  world.run(500);
  const int64_t before = world.drafted;
  world.right_of_8 = 7;
  world.run(2000);
  EXPECT_GT(world.drafted - before, 1200);
}

TEST(DraftPolicy, WhereItDoesNotPayTrialsAreRare) {
  World world;
  world.cost = 0.6;
  world.right_of_8 = 3;
  world.run(4000);
  EXPECT_LT(world.drafted, 80);
  EXPECT_GT(world.drafted, 8);
  EXPECT_GT(static_cast<double>(world.tokens) * 0.01 / world.seconds, 0.99);
}

TEST(DraftPolicy, ExpensiveTrialsAreRarer) {
  World world;
  world.cost = 0.9;
  world.right_of_8 = 6;
  world.catch_up = 0.2;  // twenty steps' time
  world.run(8000);
  EXPECT_GT(world.drafted, 8);
  EXPECT_GT(static_cast<double>(world.tokens) * 0.01 / world.seconds, 0.97);
}

TEST(DraftPolicy, TextThatBecomesEasyTurnsItOn) {
  World world;
  world.cost = 0.4;
  world.right_of_8 = 0;
  world.run(2000);
  const int64_t before = world.drafted;
  EXPECT_LT(before, 60);
  world.right_of_8 = 8;
  world.run(DraftPolicy::kLongest + 1000);
  EXPECT_GT(world.drafted - before, 800);
}

TEST(DraftPolicy, LengthsStayWithinTheirLimits) {
  World world;
  world.cost = 0.02;
  world.right_of_8 = 8;
  world.run(200);
  world.policy.begin_step(1);
  EXPECT_EQ(world.policy.length(0, 0.9), 0);
  EXPECT_EQ(world.policy.length(1, 0.9), 1);
  EXPECT_GT(world.policy.length(4, 0.9), 1);
}

TEST(DraftPolicy, OtherNumbersOfSequencesGetTheirOwnTrial) {
  World world;
  world.run(200);
  DraftPolicy& policy = world.policy;
  int64_t trials = 0;
  for (int step = 0; step < 100; ++step) {
    policy.begin_step(16);
    trials += policy.in_trial() ? 1 : 0;
    const int64_t drafts = 16 * policy.length(1, world.acceptance.value(policy.acceptance()));
    policy.end_step(drafts, drafts > 0 ? 0.19 : 0.1);
  }
  EXPECT_GT(trials, 0);
  EXPECT_NEAR(policy.cost(), 0.9, 0.01);
  policy.begin_step(16);
  EXPECT_EQ(policy.length(1, world.acceptance.value(policy.acceptance())), 0);
}

/// Blocks of five drafts that cost the same however many count; `right` of each are accepted.
double drafted_share_of_blocks(double cost, int64_t right) {
  DraftPolicy policy(5);
  DraftAcceptance acceptance;
  int64_t blocks = 0;
  for (int64_t step = 0; step < 2000; ++step) {
    policy.begin_step(1);
    const int64_t drafts = policy.length(5, acceptance.value(policy.acceptance()));
    EXPECT_TRUE(drafts == 0 || drafts == 5) << drafts;
    policy.end_step(drafts, 0.01 * (1 + (drafts > 0 ? cost : 0)));
    policy.add(acceptance, drafts, std::min(drafts, right));
    blocks += drafts > 0 ? 1 : 0;
  }
  return static_cast<double>(blocks) / 2000;
}

TEST(DraftPolicy, BlocksAreMadeWholeWhereTheyPay) {
  // Three more tokens for a step that takes twice as long; one more for a step that does so.
  EXPECT_GT(drafted_share_of_blocks(1.0, 3), 0.9);
  EXPECT_LT(drafted_share_of_blocks(1.5, 1), 0.1);
}

}  // namespace
}  // namespace hadal::engine_core
