#include "base/parallel.h"

#include <atomic>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

namespace hadal {
namespace {

class Parallel : public ::testing::Test {
 protected:
  void TearDown() override { set_num_threads(2); }
};

TEST_F(Parallel, CoversEveryItemOnceForAnyThreadCount) {
  for (const int threads : {1, 2, 3, 7}) {
    set_num_threads(threads);
    for (const int64_t count : {0, 1, 2, 5, 64, 1001}) {
      std::vector<int> hits(static_cast<size_t>(count), 0);
      parallel_for(count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++hits[static_cast<size_t>(i)];
      });
      for (const int hit : hits) ASSERT_EQ(hit, 1);
    }
  }
}

TEST_F(Parallel, RethrowsAndStaysUsable) {
  set_num_threads(3);
  EXPECT_THROW(parallel_for(3, 1,
                            [](int64_t begin, int64_t) {
                              if (begin == 1) throw std::runtime_error("task failed");
                            }),
               std::runtime_error);
  std::atomic<int64_t> sum{0};
  parallel_for(100, 1, [&](int64_t begin, int64_t end) { sum += end - begin; });
  EXPECT_EQ(sum.load(), 100);
}

TEST_F(Parallel, NestedRegionsRunInline) {
  set_num_threads(4);
  std::atomic<int64_t> sum{0};
  parallel_for(8, 1, [&](int64_t begin, int64_t end) {
    parallel_for(end - begin, 1, [&](int64_t b, int64_t e) { sum += e - b; });
  });
  EXPECT_EQ(sum.load(), 8);
}

TEST_F(Parallel, CallersOnSeveralThreadsTakeTurns) {
  set_num_threads(2);
  std::atomic<int64_t> sum{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&] {
      for (int round = 0; round < 200; ++round) {
        parallel_for(10, 1, [&](int64_t begin, int64_t end) { sum += end - begin; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(sum.load(), 4 * 200 * 10);
}

}  // namespace
}  // namespace hadal
