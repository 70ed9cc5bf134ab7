#include "engine/recorded_steps.h"

#include <algorithm>

#include <gtest/gtest.h>

namespace hadal::engine {
namespace {

// Few kinds of steps on the way to a million tokens, none of them much longer than the step.
TEST(RecordedSteps, EndsArePaddedByAnEighthAtMost) {
  int64_t kinds = 0, last = 0;
  for (int64_t end = 1; end <= 1'048'576; end += end < 20'000 ? 1 : 97) {
    const int64_t padded = RecordedSteps::padded_end(end);
    ASSERT_GE(padded, end);
    ASSERT_GE(padded, last);
    ASSERT_LE(padded - end, std::max<int64_t>(1023, end / 8)) << end;
    ASSERT_EQ(RecordedSteps::padded_end(padded), padded);
    kinds += padded != last;
    last = padded;
  }
  EXPECT_LE(kinds, 70);
}

}  // namespace
}  // namespace hadal::engine
