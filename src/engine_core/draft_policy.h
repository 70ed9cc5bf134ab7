// How many tokens to draft: as many as pay, by measured acceptance and measured time, none where
// none pays. It decides speed, never tokens.
#pragma once

#include <cstdint>

namespace hadal::engine {

/// Time of a decoding step as a line over its rows, fitted with forgetting, and of one draft.
class StepCost {
 public:
  /// A step of `rows` tokens that took `seconds`, and `draft_seconds` for `drafts` drafts before.
  void add(int64_t rows, double seconds, int64_t drafts, double draft_seconds);
  /// Time of one more draft for each of `sequences`, relative to a step without any; an assumption
  /// until steps of different sizes were seen.
  double draft_cost(int64_t sequences) const;

 private:
  double n_ = 0, x_ = 0, y_ = 0, xx_ = 0, xy_ = 0;
  double drafts_ = 0, draft_seconds_ = 0;
};

/// Acceptance of one sequence's drafts.
class DraftPolicy {
 public:
  /// Drafts for the next step: maximises expected tokens / time, at most `limit`. Where that is
  /// none, one draft every kProbe tokens looks again.
  int64_t length(int64_t limit, double draft_cost);
  void add(int64_t drafted, int64_t accepted);
  double acceptance() const { return acceptance_; }

  static constexpr int64_t kProbe = 32;

 private:
  double acceptance_ = 0.7;  ///< that a draft is right given that those before it are
  int64_t since_probe_ = 0;
};

}  // namespace hadal::engine
