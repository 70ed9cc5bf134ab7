#include "engine_core/draft_policy.h"

#include <algorithm>

namespace hadal::engine {
namespace {

constexpr double kKeep = 0.99;         ///< a step's weight in the fit after the next one
constexpr double kAssumedCost = 0.3;   ///< of one draft and its row, before there are figures
constexpr double kSequenceKeep = 0.9;  ///< a draft's weight in a sequence's acceptance
constexpr double kMinGain = 1.02;      ///< drafts that gain less are noise

}  // namespace

void StepCost::add(int64_t rows, double seconds, int64_t drafts, double draft_seconds) {
  const auto x = static_cast<double>(rows);
  n_ = n_ * kKeep + 1;
  x_ = x_ * kKeep + x;
  y_ = y_ * kKeep + seconds;
  xx_ = xx_ * kKeep + x * x;
  xy_ = xy_ * kKeep + x * seconds;
  drafts_ = drafts_ * kKeep + static_cast<double>(drafts);
  draft_seconds_ = draft_seconds_ * kKeep + draft_seconds;
}

double StepCost::draft_cost(int64_t sequences) const {
  const double spread = n_ * xx_ - x_ * x_;
  if (n_ < 8 || spread < 0.01 * n_ * n_ || drafts_ <= 0) return kAssumedCost;
  const double slope = std::max((n_ * xy_ - x_ * y_) / spread, 0.0);
  const double base = (y_ - slope * x_) / n_;
  const double step = std::max(base, 0.0) + slope * static_cast<double>(sequences);
  if (step <= 0) return kAssumedCost;
  return static_cast<double>(sequences) * (slope + draft_seconds_ / drafts_) / step;
}

int64_t DraftPolicy::length(int64_t limit, double draft_cost) {
  int64_t best = 0;
  double best_rate = kMinGain, tokens = 1, reach = 1;
  for (int64_t drafts = 1; drafts <= limit; ++drafts) {
    reach *= acceptance_;
    tokens += reach;
    const double rate = tokens / (1 + draft_cost * static_cast<double>(drafts));
    if (rate <= best_rate) continue;
    best_rate = rate;
    best = drafts;
  }
  if (best > 0) {
    since_probe_ = 0;
  } else if (++since_probe_ >= kProbe && limit > 0) {
    since_probe_ = 0;
    best = 1;
  }
  return best;
}

void DraftPolicy::add(int64_t drafted, int64_t accepted) {
  for (int64_t draft = 0; draft < std::min(drafted, accepted + 1); ++draft) {
    acceptance_ = acceptance_ * kSequenceKeep + (draft < accepted ? 1 - kSequenceKeep : 0);
  }
}

}  // namespace hadal::engine
