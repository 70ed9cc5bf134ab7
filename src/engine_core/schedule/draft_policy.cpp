#include "engine_core/schedule/draft_policy.h"

#include <algorithm>
#include <bit>

namespace hadal::engine_core {
namespace {

constexpr double kAssumedCost = 0.3;    ///< of one draft and its row, before there are figures
constexpr double kSequenceKeep = 0.97;  ///< of a sequence's figures after one more draft
constexpr double kRestKeep = 0.98;      ///< and after a step without
constexpr double kPrior = 16;           ///< drafts of its own that weigh as much as all others'
constexpr double kKeep = 0.995;         ///< of the figures over all
constexpr double kMinGain = 1.03;       ///< drafts that gain less are noise
constexpr size_t kTrials = 3;           ///< whose median counts
constexpr double kTrialShare = 0.02;    ///< of the time, at most, for trials of drafts

/// Exact up to 8, then to an eighth of the power of two below.
int64_t rounded(int64_t sequences) {
  const int shift =
      std::max(0, static_cast<int>(std::bit_width(static_cast<uint64_t>(sequences))) - 4);
  return sequences >> shift << shift;
}

double median(std::vector<double> values) {
  std::ranges::sort(values);
  const size_t half = values.size() / 2;
  return values.size() % 2 == 1 ? values[half] : (values[half - 1] + values[half]) / 2;
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

double DraftPolicy::rate(int64_t drafts, double acceptance) const {
  double tokens = 1, reach = 1;
  for (int64_t draft = 0; draft < drafts; ++draft) tokens += reach *= acceptance;
  return tokens / (1 + cost() * (at_once_ > 1 ? 1.0 : static_cast<double>(drafts)));
}

bool DraftPolicy::pays() const { return rate(at_once_, acceptance()) > kMinGain; }

double DraftPolicy::Block::usual() const { return median({seconds.begin(), seconds.end()}); }

void DraftPolicy::begin_step(int64_t sequences) {
  if (rounded(sequences) != rounded(sequences_)) {
    blocks_.clear();
    lately_.seconds.clear();
  }
  sequences_ = sequences;
  if (in_trial()) return;
  const bool known = costs_.contains(rounded(sequences));
  if (++since_trial_ > (known ? wait_ : kFirstWait)) begin_trial();
}

void DraftPolicy::begin_trial() {
  if (lately_.seconds.size() < kBlockSteps) return;
  blocks_ = {lately_, Block(!lately_.with_drafts)};
  drafted_steps_ = 0;
  drafted_seconds_ = 0;
}

int64_t DraftPolicy::length(int64_t limit, double acceptance) const {
  if (limit <= 0) return 0;
  if (in_trial()) return blocks_.back().with_drafts ? std::min(limit, at_once_) : 0;
  // Without figures a trial comes first.
  if (costs_.empty()) return 0;
  if (at_once_ > 1) return rate(limit, acceptance) > kMinGain ? limit : 0;
  int64_t best = 0;
  double best_rate = kMinGain;
  for (int64_t drafts = 1; drafts <= limit; ++drafts) {
    const double of_drafts = rate(drafts, acceptance);
    if (of_drafts <= best_rate) continue;
    best_rate = of_drafts;
    best = drafts;
  }
  return best;
}

void DraftPolicy::end_step(int64_t drafts, double seconds) {
  const bool drafted = drafts > 0;
  const bool catches_up = drafted && !lately_.with_drafts;
  if (lately_.with_drafts != drafted) lately_ = Block(drafted);
  if (in_trial() && drafted) {
    ++drafted_steps_;
    drafted_seconds_ += seconds;
  }
  if (catches_up) return;
  const double share = static_cast<double>(drafts) / static_cast<double>(sequences_);
  const auto count = [&](Block& block) {
    block.drafts = share;
    block.seconds.push_back(seconds);
    if (block.seconds.size() > kBlockSteps) block.seconds.pop_front();
  };
  count(lately_);
  if (!in_trial()) return;
  Block& block = blocks_.back();
  if (block.with_drafts != drafted) return;  // limits forbade it
  count(block);
  if (block.seconds.size() < kBlockSteps) return;
  if (blocks_.size() == kBlocks) {
    end_trial();
  } else {
    blocks_.emplace_back(!drafted);
  }
}

void DraftPolicy::end_trial() {
  since_trial_ = 0;
  const bool drafted_before = blocks_.front().with_drafts;
  double sum = 0, usual_plain = 0;
  for (size_t index = 1; index < blocks_.size(); ++index) {
    const Block &one = blocks_[index - 1], &other = blocks_[index];
    const Block& drafted = one.with_drafts ? one : other;
    const double plain = (one.with_drafts ? other : one).usual();
    if (plain <= 0) return blocks_.clear();
    sum += (drafted.usual() / plain - 1) / (at_once_ > 1 ? 1.0 : drafted.drafts);
    usual_plain = plain;
  }
  blocks_.clear();
  Costs& costs = costs_[rounded(sequences_)];
  costs.latest.push_back(std::max(sum / (kBlocks - 1), 0.0));
  if (costs.latest.size() > kTrials) costs.latest.erase(costs.latest.begin());
  costs.value = median(costs.latest);
  if (costs.latest.size() < kTrials) {
    wait_ = kSoon;
  } else {
    wait_ = pays() == drafted_before ? std::min(std::max(2 * wait_, kWait), kLongest) : kWait;
  }
  if (drafted_before) return;
  const double extra = drafted_seconds_ / usual_plain - drafted_steps_;
  const double least = std::min(extra / kTrialShare, static_cast<double>(kLongest));
  wait_ = std::max(wait_, static_cast<int64_t>(least));
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

}  // namespace hadal::engine_core
