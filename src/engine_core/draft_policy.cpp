#include "engine_core/draft_policy.h"

#include <algorithm>
#include <bit>

namespace hadal::engine {
namespace {

constexpr double kAssumedCost = 0.3;    ///< of one draft and its row, before there are figures
constexpr double kSequenceKeep = 0.95;  ///< of a sequence's figures after one more draft
constexpr double kRestKeep = 0.98;      ///< and after a step without
constexpr double kPrior = 8;            ///< drafts of its own that weigh as much as all others'
constexpr double kKeep = 0.99;          ///< of the figures over all
constexpr double kMinGain = 1.03;       ///< drafts that gain less are noise
constexpr size_t kCompared = 8;         ///< steps before a trial
constexpr size_t kTrials = 3;           ///< whose median counts

/// Exact up to 8, then to an eighth of the power of two below.
int64_t rounded(int64_t sequences) {
  const int shift =
      std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(sequences))) - 4);
  return sequences >> shift << shift;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

double DraftAcceptance::value(double of_all) const {
  return (right_ + kPrior * of_all) / (drafts_ + kPrior);
}

void DraftAcceptance::add(int64_t drafted, int64_t accepted) {
  for (int64_t draft = 0; draft < std::min(drafted, accepted + 1); ++draft) {
    drafts_ = drafts_ * kSequenceKeep + 1;
    right_ = right_ * kSequenceKeep + (draft < accepted ? 1 : 0);
  }
}

void DraftAcceptance::rest() {
  drafts_ *= kRestKeep;
  right_ *= kRestKeep;
}

double DraftPolicy::cost() const {
  if (costs_.empty()) return kAssumedCost;
  auto nearest = costs_.lower_bound(rounded(sequences_));
  if (nearest == costs_.end()) --nearest;
  return nearest->second.value;
}

bool DraftPolicy::pays() const { return (1 + acceptance()) / (1 + cost()) > kMinGain; }

void DraftPolicy::begin_step(int64_t sequences) {
  if (rounded(sequences) != rounded(sequences_)) {
    left_ = 0;
    plain_.clear();
    drafted_.clear();
  }
  sequences_ = sequences;
  if (left_ > 0) return;
  const bool known = costs_.contains(rounded(sequences));
  if (++since_trial_ > (known ? wait_ : kFirstWait)) begin_trial();
}

void DraftPolicy::begin_trial() {
  const std::deque<double>& before = drafts_lately_ ? drafted_ : plain_;
  if (before.size() < kCompared) return;
  trial_drafts_ = !drafts_lately_;
  (trial_drafts_ ? drafted_ : plain_).clear();
  left_ = trial_drafts_ ? kDraftTrial : kPlainTrial;
}

int64_t DraftPolicy::length(int64_t limit, double acceptance) const {
  if (limit <= 0) return 0;
  if (left_ > 0) return trial_drafts_ ? 1 : 0;
  // Without figures a trial comes first.
  if (costs_.empty()) return 0;
  const double draft_cost = cost();
  int64_t best = 0;
  double best_rate = kMinGain, tokens = 1, reach = 1;
  for (int64_t drafts = 1; drafts <= limit; ++drafts) {
    reach *= acceptance;
    tokens += reach;
    const double rate = tokens / (1 + draft_cost * static_cast<double>(drafts));
    if (rate <= best_rate) continue;
    best_rate = rate;
    best = drafts;
  }
  return best;
}

void DraftPolicy::end_step(int64_t drafts, double seconds) {
  const bool drafted = drafts > 0;
  if (left_ > 0 && drafted != trial_drafts_) return;  // limits forbade it
  const bool catches_up = drafted && !drafts_lately_;
  drafts_lately_ = drafted;
  if (!catches_up) {
    std::deque<double>& times = drafted ? drafted_ : plain_;
    times.push_back(seconds);
    if (times.size() > kCompared) times.pop_front();
  }
  if (drafted) drafts_a_sequence_ = static_cast<double>(drafts) / static_cast<double>(sequences_);
  if (left_ == 0) return;
  --left_;
  if (left_ == 0) end_trial();
}

void DraftPolicy::end_trial() {
  since_trial_ = 0;
  if (plain_.empty() || drafted_.empty()) return;
  const double plain = *std::ranges::min_element(plain_);
  const double drafted = *std::ranges::min_element(drafted_);
  if (plain <= 0) return;
  Costs& costs = costs_[rounded(sequences_)];
  costs.latest.push_back(std::max(drafted / plain - 1, 0.0) / drafts_a_sequence_);
  if (costs.latest.size() > kTrials) costs.latest.erase(costs.latest.begin());
  costs.value = median(costs.latest);
  // A trial that is followed by what was done before it confirms that.
  wait_ = pays() != trial_drafts_ ? std::min(2 * wait_, kLongest) : kWait;
}

void DraftPolicy::add(DraftAcceptance& sequence, int64_t drafted, int64_t accepted) {
  if (drafted == 0) {
    sequence.rest();
    return;
  }
  sequence.add(drafted, accepted);
  for (int64_t draft = 0; draft < std::min(drafted, accepted + 1); ++draft) {
    drafts_ = drafts_ * kKeep + 1;
    right_ = right_ * kKeep + (draft < accepted ? 1 : 0);
  }
}

}  // namespace hadal::engine
