// How many tokens to draft: as many as pay, by measured acceptance and measured time, none where
// none pays. It decides speed, never tokens.
//
// What drafts cost is found by trials: a few steps with a draft for everybody among steps without
// any, or the reverse. Their fastest step is compared with the fastest of as many just before,
// since what else the machine does only ever adds time. Trials become rare while they confirm what
// is done. One thread.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <vector>

namespace hadal::engine {

/// Of one sequence: that a draft is right given that those before it are. Few drafts say little,
/// and old ones are forgotten, so it stays near what holds for all until it has its own figures.
class DraftAcceptance {
 public:
  double value(double of_all) const;
  void add(int64_t drafted, int64_t accepted);
  /// A step without a draft.
  void rest();

 private:
  double drafts_ = 0, right_ = 0;
};

class DraftPolicy {
 public:
  /// A step of `sequences` >= 1 answers begins; asked for the lengths next.
  void begin_step(int64_t sequences);
  /// Drafts for every sequence in this step, at most `limit`: maximises expected tokens / time.
  /// `acceptance` is the sequences' mean. All draft or none, since what one draft costs most is
  /// that anybody drafts at all.
  int64_t length(int64_t limit, double acceptance) const;
  /// The step had no prompts, and with its `drafts` drafts took `seconds`. Other steps are not
  /// told.
  void end_step(int64_t drafts, double seconds);
  void add(DraftAcceptance& sequence, int64_t drafted, int64_t accepted);

  /// Time of one more draft for every sequence, relative to a step without; 0.3 until it is known.
  double cost() const;
  /// Over all sequences, the latest most.
  double acceptance() const { return right_ / drafts_; }
  bool in_trial() const { return left_ > 0; }

  static constexpr int64_t kFirstWait = 8;   ///< steps before the first trial
  static constexpr int64_t kWait = 256;      ///< between trials
  static constexpr int64_t kLongest = 4096;  ///< between trials that change nothing
  static constexpr int64_t kDraftTrial = 9;  ///< steps; the first catches up and is not counted
  static constexpr int64_t kPlainTrial = 8;  ///< steps

 private:
  struct Costs {
    std::vector<double> latest;  ///< of the last trials, at most three
    double value = 0;            ///< their median
  };
  void begin_trial();
  void end_trial();
  bool pays() const;

  int64_t sequences_ = 1;
  std::map<int64_t, Costs> costs_;      ///< by rounded number of sequences
  std::deque<double> plain_, drafted_;  ///< seconds of the latest steps of either kind
  double drafts_a_sequence_ = 1;        ///< in the latest steps with drafts
  bool drafts_lately_ = false;
  bool trial_drafts_ = false;
  int64_t left_ = 0;  ///< steps of the trial
  int64_t since_trial_ = 0, wait_ = kWait;
  double drafts_ = 4, right_ = 2.4;  ///< of all sequences; an assumption until there are some
};

}  // namespace hadal::engine
