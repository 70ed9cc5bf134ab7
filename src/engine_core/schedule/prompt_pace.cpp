#include "engine_core/schedule/prompt_pace.h"

#include <algorithm>
#include <bit>

namespace hadal::engine_core {
namespace {

constexpr double kKeepTime = 0.8;  ///< of a figure after one more step
constexpr double kMostAtOnce = 2;  ///< a step that was held up counts at most as so much of usual

int64_t log2_of(int64_t answers) { return std::bit_width(static_cast<uint64_t>(answers)); }

void note(double seconds, double* usual) {
  if (*usual <= 0) {
    *usual = seconds;
  } else {
    *usual = kKeepTime * *usual + (1 - kKeepTime) * std::min(seconds, kMostAtOnce * *usual);
  }
}

}  // namespace

// Of as many answers, or of the next known number above, or below.
double PromptPace::plain(int64_t answers) const {
  if (plain_.empty()) return 0;
  auto nearest = plain_.lower_bound(log2_of(answers));
  if (nearest == plain_.end()) --nearest;
  return nearest->second;
}

int64_t PromptPace::rows(int64_t answers, int64_t limit) const {
  const double usual = plain(answers);
  if (usual <= 0 || row_ <= 0) return limit;
  const double room = std::max(kSlowdown * usual, unnoticed_) - usual;
  const double rows = std::min(room / row_, static_cast<double>(limit));
  return std::max({static_cast<int64_t>(rows), limit / 8, int64_t{1}});
}

void PromptPace::end_step(int64_t answers, int64_t prompt_rows, double seconds) {
  if (prompt_rows == 0) {
    if (answers > 0 && seconds > 0) note(seconds, &plain_[log2_of(answers)]);
    return;
  }
  const double rest = answers > 0 ? plain(answers) : 0;
  note(std::max(seconds - rest, 0.1 * seconds) / static_cast<double>(prompt_rows), &row_);
}

}  // namespace hadal::engine_core
