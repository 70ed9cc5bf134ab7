#include "train/schedule.h"

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::train {
namespace {

const LearningRate kRate{.peak = 4.0,
                         .warmup_tokens = 100,
                         .decay_start_tokens = 600,
                         .decay_end_tokens = 1000,
                         .final_rate = 1.0};

TEST(Schedule, LearningRateAtItsBreakpoints) {
  // A step's rate is that of its middle.
  EXPECT_DOUBLE_EQ(kRate.at(0, 0), 0.0);
  EXPECT_DOUBLE_EQ(kRate.at(0, 10), 0.2);
  EXPECT_DOUBLE_EQ(kRate.at(40, 20), 2.0);
  EXPECT_DOUBLE_EQ(kRate.at(99, 0), 3.96);
  EXPECT_DOUBLE_EQ(kRate.at(100, 0), 4.0);
  EXPECT_DOUBLE_EQ(kRate.at(599, 0), 4.0);
  EXPECT_DOUBLE_EQ(kRate.at(600, 0), 4.0);
  EXPECT_NEAR(kRate.at(700, 0), 1.0 + 3.0 * 0.85355339059327, 1e-12);
  EXPECT_DOUBLE_EQ(kRate.at(800, 0), 2.5);
  EXPECT_NEAR(kRate.at(900, 0), 1.0 + 3.0 * 0.14644660940673, 1e-12);
  EXPECT_DOUBLE_EQ(kRate.at(1000, 0), 1.0);
  EXPECT_DOUBLE_EQ(kRate.at(5000, 10), 1.0);
}

TEST(Schedule, LearningRateRisesThenFallsAndDependsOnTokensAlone) {
  for (int64_t tokens = 1; tokens < 1100; ++tokens) {
    const double before = kRate.at(tokens - 1, 4), now = kRate.at(tokens, 4);
    EXPECT_TRUE(tokens + 2 >= 100 || now > before) << tokens;
    EXPECT_TRUE(tokens + 1 < 100 || now <= before) << tokens;
    EXPECT_EQ(now, kRate.at(tokens, 4));
    EXPECT_GE(now, 0.0);
    EXPECT_LE(now, kRate.peak);
  }
}

TEST(Schedule, WithoutWarmUpAndDecayTheRateIsConstant) {
  const LearningRate flat{.peak = 2.0,
                          .warmup_tokens = 0,
                          .decay_start_tokens = 10,
                          .decay_end_tokens = 10,
                          .final_rate = 0.5};
  EXPECT_DOUBLE_EQ(flat.at(0, 0), 2.0);
  EXPECT_DOUBLE_EQ(flat.at(9, 0), 2.0);
  EXPECT_DOUBLE_EQ(flat.at(10, 0), 0.5);
}

TEST(Schedule, BatchAndMtpWeightChangeAtTheirTokens) {
  const Schedule schedule{.learning_rate = kRate,
                          .batch = {{0, 8}, {50, 16}, {200, 64}},
                          .mtp_weight = 0.3,
                          .mtp_weight_decay = 0.1};
  EXPECT_EQ(schedule.batch_tokens(0), 8);
  EXPECT_EQ(schedule.batch_tokens(49), 8);
  EXPECT_EQ(schedule.batch_tokens(50), 16);
  EXPECT_EQ(schedule.batch_tokens(199), 16);
  EXPECT_EQ(schedule.batch_tokens(1000000), 64);
  EXPECT_EQ(schedule.mtp_weight_at(599), 0.3);
  EXPECT_EQ(schedule.mtp_weight_at(600), 0.1);
  EXPECT_THROW(Schedule{}.batch_tokens(0), Error);
}

TEST(Schedule, AttentionModesHaveNames) {
  using model::AttentionMode;
  for (const AttentionMode mode :
       {AttentionMode::kDense, AttentionMode::kIndexerWarmup, AttentionMode::kSparse}) {
    EXPECT_EQ(parse_attention_mode(attention_mode_name(mode), "x"), mode);
  }
  EXPECT_THROW(parse_attention_mode("Dense", "x"), InputError);
}

}  // namespace
}  // namespace hadal::train
