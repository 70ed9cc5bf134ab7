// How many rows of prompts a step takes beside running answers: so many that nobody's next token
// takes much longer than usual, by measured time. It decides speed, never tokens. One thread.
#pragma once

#include <cstdint>
#include <map>

namespace hadal::engine_core {

class PromptPace {
 public:
  /// `unnoticed`: seconds, below.
  explicit PromptPace(double unnoticed = 0.02) : unnoticed_(unnoticed) {}

  /// Rows for the prompts of a step with `answers` >= 1 running, at most `limit`, at least an
  /// eighth of it (prompts that crawl hold memory longer); `limit` until there are figures.
  int64_t rows(int64_t answers, int64_t limit) const;
  /// A step with `answers` and `prompt_rows` rows took `seconds`.
  void end_step(int64_t answers, int64_t prompt_rows, double seconds);

  /// A step with prompts may take so many times one without, or so long as is unnoticed, whichever
  /// is more.
  static constexpr double kSlowdown = 4;

 private:
  double plain(int64_t answers) const;

  double unnoticed_;
  std::map<int64_t, double> plain_;  ///< seconds of a step without prompts, by its answers' log2
  double row_ = 0;                   ///< seconds of one row of a prompt, lately; 0: not known
};

}  // namespace hadal::engine_core
