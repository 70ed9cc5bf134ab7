#include "engine_core/schedule/prompt_pace.h"

#include <algorithm>

#include <gtest/gtest.h>

namespace hadal::engine_core {
namespace {

/// Steps with a prompt without end beside `answers`; the seconds of the last.
double settle(PromptPace* pace, int64_t answers, double plain, double row, int64_t limit = 256) {
  for (int step = 0; step < 20; ++step) pace->end_step(answers, 0, plain);
  double seconds = 0;
  for (int step = 0; step < 60; ++step) {
    const int64_t rows = pace->rows(answers, limit);
    EXPECT_GE(rows, 1);
    EXPECT_LE(rows, limit);
    seconds = plain + row * static_cast<double>(rows);
    pace->end_step(answers, rows, seconds);
  }
  return seconds;
}

TEST(PromptPace, AStepWithPromptsTakesFourTimesOneWithoutOrAMoment) {
  PromptPace many, one, cheap, crawling;
  EXPECT_NEAR(settle(&many, 64, 0.024, 0.0006), 0.096, 0.002);
  EXPECT_NEAR(settle(&one, 1, 0.0015, 0.0003), 0.02, 0.001);
  PromptPace patient(0.05);
  EXPECT_NEAR(settle(&patient, 1, 0.0015, 0.0005), 0.05, 0.001);
  // A machine that does the whole step in less takes the whole step.
  EXPECT_NEAR(settle(&cheap, 64, 0.005, 0.00001), 0.005 + 256 * 0.00001, 1e-9);
  EXPECT_NEAR(settle(&crawling, 1, 0.001, 0.01), 0.001 + 32 * 0.01, 1e-9);
}

TEST(PromptPace, TakesTheLimitUntilThereAreFigures) {
  PromptPace pace;
  EXPECT_EQ(pace.rows(3, 256), 256);
  pace.end_step(0, 1024, 0.5);
  EXPECT_EQ(pace.rows(3, 256), 256);
  pace.end_step(3, 0, 0.01);
  EXPECT_EQ(pace.rows(3, 256), static_cast<int64_t>(0.03 / (0.5 / 1024)));
  EXPECT_EQ(pace.rows(3, 4), 4);
  EXPECT_EQ(pace.rows(3, 1), 1);
}

TEST(PromptPace, OneStepThatWasHeldUpChangesLittle) {
  PromptPace pace;
  settle(&pace, 64, 0.024, 0.0006);
  const int64_t before = pace.rows(64, 256);
  pace.end_step(64, before, 5.0);
  EXPECT_GE(pace.rows(64, 256), before * 3 / 4);
  pace.end_step(64, 0, 5.0);
  EXPECT_LE(pace.rows(64, 256), before * 2);
}

TEST(PromptPace, RowsThatGrowDearerBecomeFewer) {
  // As deep in a long context.
  PromptPace pace;
  for (int step = 0; step < 20; ++step) pace.end_step(16, 0, 0.02);
  double longest = 0;
  for (int step = 0; step < 300; ++step) {
    const double row = 0.0004 + 0.000002 * step;
    const int64_t rows = pace.rows(16, 256);
    const double seconds = 0.02 + row * static_cast<double>(rows);
    if (step > 5) longest = std::max(longest, seconds);
    pace.end_step(16, rows, seconds);
  }
  EXPECT_LT(longest, 0.085);
}

}  // namespace
}  // namespace hadal::engine_core
