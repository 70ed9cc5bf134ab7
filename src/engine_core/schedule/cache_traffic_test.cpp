// How much of what came before comes again, against what the same bytes allow.
#include "testing/cache_traffic.h"

#include <cmath>
#include <cstdio>

namespace hadal::engine_core {
namespace {

using testing::traffic::Counts;
using testing::traffic::in_turns;
using testing::traffic::kNano;
using testing::traffic::oracle;
using testing::traffic::people;
using testing::traffic::Served;
using testing::traffic::Traffic;
using testing::traffic::with_beginning;

constexpr int64_t kMiB = int64_t{1} << 20;

struct Case {
  const char* name;
  Traffic (*make)();
  int64_t mib;
  double least;  ///< of what the bytes allow
};
void PrintTo(const Case& one, std::ostream* out) { *out << one.name << one.mib; }

class CacheTraffic : public ::testing::TestWithParam<Case> {};

TEST_P(CacheTraffic, ReusesWhatTheBytesAllow) {
  const Case& one = GetParam();
  const Traffic all = one.make();
  constexpr int64_t kSlots = 8;
  const int64_t bytes = one.mib * kMiB - kSlots * kNano.state_bytes;
  SchedulerOptions options;
  options.max_running = kSlots;
  Served served(kNano, bytes / kNano.page_bytes, kSlots, options);
  Counts got = served.run(all);
  const Counts best = oracle(kNano, bytes, all);
  got.reusable = best.reusable;
  std::printf("%s %lld MiB: %.3f of what came before, the bytes allow %.3f: %.3f\n", one.name,
              static_cast<long long>(one.mib), got.share(), best.share(),
              got.share() / best.share());
  EXPECT_GE(got.share(), one.least * best.share());
}

Traffic ninety() { return in_turns(90, 5000, 5, 2, 1); }
Traffic ninety_whole() { return in_turns(90, 5000, 1, 3, 2); }
Traffic thirty_two() { return with_beginning(32, 20'000, 4, 8, 3); }
Traffic crowd() { return people(1500, 60, 4); }

INSTANTIATE_TEST_SUITE_P(Conversations,
                         CacheTraffic,
                         ::testing::Values(Case{"ninety", ninety, 1024, 0.95},
                                           Case{"ninety", ninety, 128, 0.95},
                                           Case{"ninety", ninety, 64, 0.95},
                                           Case{"ninety_whole", ninety_whole, 1024, 0.95},
                                           Case{"ninety_whole", ninety_whole, 128, 0.95},
                                           Case{"ninety_whole", ninety_whole, 64, 0.85},
                                           Case{"thirty_two", thirty_two, 1024, 0.95},
                                           Case{"thirty_two", thirty_two, 64, 0.95},
                                           Case{"thirty_two", thirty_two, 40, 0.95},
                                           Case{"people", crowd, 512, 0.95},
                                           Case{"people", crowd, 128, 0.95},
                                           Case{"people", crowd, 64, 0.88}),
                         [](const auto& test) {
                           return std::string(test.param.name) + std::to_string(test.param.mib);
                         });

}  // namespace
}  // namespace hadal::engine_core
