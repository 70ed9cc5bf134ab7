// E1 on the shipped model, in the released precision: see src/engine/schedule_test.cpp.
#include <iostream>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/math.h"
#include "checkpoint/load_model.h"
#include "checkpoint/official.h"
#include "testing/schedules.h"

namespace hadal {
namespace {

TEST(NanoSchedules, GiveTheLogitsOfTheRequestAlone) {
  const std::string folder = concat(HADAL_SOURCE_DIR, "/models/hadal-nano");
  const model::Transformer model = checkpoint::load_model(
      checkpoint::OfficialCheckpoint::open(folder), ops::Numerics::kReleased);
  const int64_t wanted = ceil_div(testing::schedules_wanted(50), int64_t{10});
  testing::Schedules schedules(model, ops::Numerics::kReleased,
                               {.num_requests = 20, .max_company = 24}, 5);
  for (int64_t i = 0; i < wanted && !HasFatalFailure(); ++i) schedules.run();
  const testing::ScheduleCounts& counts = schedules.counts();
  std::cout << "  " << counts.to_string() << "\n";
  EXPECT_EQ(counts.schedules, wanted);
  EXPECT_GT(counts.tokens, 0);
}

}  // namespace
}  // namespace hadal
