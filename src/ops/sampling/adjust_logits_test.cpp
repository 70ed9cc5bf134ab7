#include "ops/sampling/adjust_logits.h"

#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::ops {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

TEST(AdjustLogits, BiasThenPenalties) {
  TokenHistory history;
  const std::vector<int64_t> prompt = {0, 1, 0}, ahead = {2, 4, 2};
  history.add_prompt(prompt);
  history.add(1);
  const std::vector<float> row = {2.0f, -2.0f, 1.0f, 4.0f, NAN, 0.0f};
  const Sampling params{.repetition_penalty = 2.0,
                        .presence_penalty = 0.25,
                        .frequency_penalty = 0.5,
                        .logit_bias = {{0, 2.0}, {5, -100.0}, {0, 1.0}}};
  const Adjustment all{.sampling = params, .history = &history, .ahead = ahead};
  EXPECT_TRUE(all.any());
  std::vector<float> logits = row;
  adjust_logits(logits, all);
  EXPECT_EQ(logits[0], 2.5f);    // (2 + 3) / 2: only in the prompt
  EXPECT_EQ(logits[1], -4.75f);  // -2 * 2 - 0.5 - 0.25
  EXPECT_EQ(logits[2], -0.75f);  // 1 / 2 - 2 * 0.5 - 0.25: twice in what comes behind
  EXPECT_EQ(logits[3], 4.0f);
  EXPECT_TRUE(std::isnan(logits[4]));
  EXPECT_EQ(logits[5], -100.0f);
  // What lies ahead counts as if it were in the history.
  for (const int64_t token : ahead) history.add(token);
  std::vector<float> counted = row;
  adjust_logits(counted, {.sampling = params, .history = &history});
  EXPECT_EQ(std::vector<float>(counted.begin(), counted.begin() + 4),
            std::vector<float>(logits.begin(), logits.begin() + 4));
  const Sampling none;
  const Adjustment nothing{.sampling = none, .history = &history};
  EXPECT_FALSE(nothing.any());
  std::vector<float> same = row;
  adjust_logits(same, nothing);
  EXPECT_EQ(std::vector<float>(same.begin(), same.begin() + 4),
            std::vector<float>(row.begin(), row.begin() + 4));
  const Sampling outside{.logit_bias = {{6, 1.0}}};
  EXPECT_THROW(adjust_logits(same, {.sampling = outside}), Error);
}

TEST(AdjustLogits, MasksAndAvoidsInTheRow) {
  const Sampling plain;
  const std::vector<float> row = {1.0f, 3.0f, 2.0f, 0.0f};
  const std::vector<int64_t> avoided = {1, 3};
  const auto adjusted = [&](uint32_t mask, std::span<const int64_t> tokens) {
    const std::vector<uint32_t> words = {mask};
    std::vector<float> logits = row;
    adjust_logits(logits, {.sampling = plain, .mask = words, .avoided = tokens});
    return logits;
  };
  EXPECT_EQ(adjusted(0b0101, {}), (std::vector<float>{1.0f, kNever, 2.0f, kNever}));
  EXPECT_EQ(adjusted(0b1111, avoided), (std::vector<float>{1.0f, kNever, 2.0f, kNever}));
  // Nothing else is allowed: then they are.
  EXPECT_EQ(adjusted(0b1010, avoided), (std::vector<float>{kNever, 3.0f, kNever, 0.0f}));
  const std::vector<int64_t> outside = {4};
  EXPECT_THROW(adjusted(0b1111, outside), Error);
}

}  // namespace
}  // namespace hadal::ops
