// How many tokens to draft: as many as pay, by measured acceptance and measured time, none where
// none pays. It decides speed, never tokens.
//
// What drafts cost is found by trials: the steps just before one, a few that do the opposite, a few
// as before, and once more. A drafter that makes its drafts in blocks makes all that may be or
// none: what costs is the block. A block of steps stands for its median step and is compared with
// its neighbours, so that a machine that slows down or speeds up meanwhile bears on both alike.
// Trials become rare while they confirm what is done, or where they are expensive: the first draft
// of many sequences catches up on a window of each. One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <vector>

namespace hadal::engine_core {

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
  /// at_once: drafts of a sequence that cost what one costs, their rows in the step included.
  explicit DraftPolicy(int64_t at_once = 1) : at_once_(at_once) {}
  /// A step of `sequences` >= 1 answers begins; asked for the lengths next.
  void begin_step(int64_t sequences);
  /// Drafts for every sequence in this step, at most `limit`: maximises expected tokens / time.
  /// `acceptance` is the sequences' mean. All draft or none, since what one draft costs most is
  /// that anybody drafts at all.
  int64_t length(int64_t limit, double acceptance) const;
  /// The step had no prompts, and with its `drafts` drafts took `seconds`. Other steps are not
  /// told. The first with drafts after some without catches up and is not counted.
  void end_step(int64_t drafts, double seconds);
  void add(DraftAcceptance& sequence, int64_t drafted, int64_t accepted);

  /// Time of one more draft, or of a block, for every sequence, relative to a step without; 0.3
  /// until it is known.
  double cost() const;
  /// Over all sequences, the latest most.
  double acceptance() const { return right_ / drafts_; }
  bool in_trial() const { return !blocks_.empty(); }

  static constexpr int64_t kFirstWait = 8;   ///< steps before the first trial
  static constexpr int64_t kSoon = 64;       ///< between the first ones
  static constexpr int64_t kWait = 256;      ///< between trials
  static constexpr int64_t kLongest = 4096;  ///< between trials that change nothing
  static constexpr size_t kBlockSteps = 4;
  static constexpr size_t kBlocks = 5;  ///< of a trial, with that before it

 private:
  /// Steps in a row that all have drafts, or all have none.
  struct Block {
    explicit Block(bool drafted = false) : with_drafts(drafted) {}
    bool with_drafts;
    double drafts = 0;           ///< a sequence, in the latest step
    std::deque<double> seconds;  ///< of the latest steps
    double usual() const;        ///< the median
  };
  struct Costs {
    std::vector<double> latest;  ///< of the last trials, at most three
    double value = 0;            ///< their median
  };
  void begin_trial();
  void end_trial();
  bool pays() const;
  /// Tokens of a sequence in a step with so many drafts, relative to its time.
  double rate(int64_t drafts, double acceptance) const;

  int64_t at_once_;
  int64_t sequences_ = 1;
  std::map<int64_t, Costs> costs_;  ///< by rounded number of sequences
  Block lately_;
  std::vector<Block> blocks_;  ///< of the trial; empty: none
  // Of the trial's steps with drafts, those that catch up included.
  double drafted_steps_ = 0, drafted_seconds_ = 0;
  int64_t since_trial_ = 0, wait_ = kSoon;
  double drafts_ = 16, right_ = 9.6;  ///< of all sequences; an assumption until there are some
};

}  // namespace hadal::engine_core
