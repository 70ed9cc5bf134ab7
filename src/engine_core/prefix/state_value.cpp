#include "engine_core/prefix/state_value.h"

#include <algorithm>

namespace hadal::engine_core {
namespace {

constexpr double kMostAgainst = 64;  ///< or a kind that is never kept could never prove useful
constexpr double kRemembered = 1000;

}  // namespace

double expected_wait(uint64_t age, uint64_t interval, double usual) {
  const auto passed = static_cast<double>(age);
  const double own = interval == 0 ? usual : static_cast<double>(interval);
  // Nobody is punctual: what is due may still take half as long again.
  return std::max(passed <= own ? own - passed / 2 : passed - own / 2, 1.0);
}

void StateOdds::count_used(StateKind kind) { ++counts_[static_cast<size_t>(kind)].used; }

void StateOdds::count_passed(StateKind kind) {
  Count& count = counts_[static_cast<size_t>(kind)];
  ++count.passed;
  if (count.passed + count.used < kRemembered) return;
  count.passed /= 2;
  count.used /= 2;
}

double StateOdds::against(StateKind kind) const {
  const Count& count = counts_[static_cast<size_t>(kind)];
  return std::min((count.used + count.passed) / count.used, kMostAgainst);
}

}  // namespace hadal::engine_core
