#include "ops/sampling/sample.h"

#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::ops {
namespace {

TEST(Sample, GreedyTakesTheLowestOfEqual) {
  const std::vector<float> logits = {1.0f, 3.0f, NAN, 3.0f, 2.0f};
  EXPECT_EQ(sample_token(logits, {.temperature = 0.0}, 0), 1);
  EXPECT_THROW(sample_token(std::vector<float>{NAN}, {}, 0), Error);
}

// 40,000 draws against the softmax: chi-square with 4 degrees of freedom stays below its 0.1 %
// point.
TEST(Sample, FollowsTheDistribution) {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f, 0.5f};
  constexpr double kTemperature = 0.8;
  double total = 0.0;
  for (const float x : logits) total += std::exp(x / kTemperature);
  constexpr int kDraws = 40000;
  std::vector<int> counts(logits.size(), 0);
  for (int i = 0; i < kDraws; ++i) {
    ++counts[static_cast<size_t>(
        sample_token(logits, {.temperature = kTemperature, .seed = 5}, i))];
  }
  double chi_square = 0.0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double expected = kDraws * std::exp(logits[i] / kTemperature) / total;
    chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  EXPECT_LT(chi_square, 18.47);
}

TEST(Sample, TopPCutsTheTail) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f),
                                     std::log(0.05f)};
  std::vector<int> counts(4, 0);
  for (int i = 0; i < 2000; ++i) {
    ++counts[static_cast<size_t>(sample_token(logits, {.top_p = 0.7, .seed = 1}, i))];
  }
  EXPECT_GT(counts[0], 1100);
  EXPECT_GT(counts[1], 600);
  EXPECT_EQ(counts[2] + counts[3], 0);
}

TEST(Sample, DependsOnSeedAndPositionAlone) {
  const std::vector<float> logits(100, 0.0f);
  EXPECT_EQ(sample_token(logits, {.seed = 9}, 4), sample_token(logits, {.seed = 9}, 4));
  int equal = 0;
  for (int i = 0; i < 100; ++i) {
    equal += sample_token(logits, {.seed = 9}, i) == sample_token(logits, {.seed = 10}, i);
  }
  EXPECT_LT(equal, 12);
}

TEST(Sample, LogProbabilitySumsToOne) {
  const std::vector<float> logits = {0.3f, -2.0f, 5.0f};
  double total = 0.0;
  for (int64_t i = 0; i < 3; ++i) total += std::exp(log_probability(logits, i));
  EXPECT_NEAR(total, 1.0, 1e-12);
}

}  // namespace
}  // namespace hadal::ops
