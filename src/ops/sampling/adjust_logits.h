// What bears on a row of logits before a token is drawn from it: bias, penalties, the token mask,
// tokens to be avoided. Torch-free.
#pragma once

#include <cstdint>
#include <span>
#include <unordered_map>

#include "base/sampling.h"

namespace hadal::ops {

/// How often each token stands in the prompt and in the answer so far.
class TokenHistory {
 public:
  void add_prompt(std::span<const int64_t> tokens);
  /// A token of the answer.
  void add(int64_t token) { ++counts_[token].in_answer; }

  struct Count {
    bool in_prompt = false;
    int64_t in_answer = 0;
  };
  /// Of every token that stands anywhere, in no order.
  const std::unordered_map<int64_t, Count>& counts() const { return counts_; }

 private:
  std::unordered_map<int64_t, Count> counts_;
};

/// Whether a penalty does anything: who counts tokens need not otherwise.
bool has_penalties(const Sampling& sampling);

/// What is done to a row, in this order.
struct Adjustment {
  const Sampling& sampling;               ///< bias, then the penalties
  const TokenHistory* history = nullptr;  ///< for the penalties; null: of nothing
  std::span<const int64_t> ahead = {};    ///< tokens of the answer behind the history
  /// Bit t % 32 of word t / 32: token t is allowed. Tokens behind its end are not; empty: all are.
  std::span<const uint32_t> mask = {};
  std::span<const int64_t> avoided = {};  ///< not allowed, unless nothing else is
  bool any() const;                       ///< whether there is anything to do
};

/// In place; what is not allowed becomes -infinity. Errors: Error for a biased or avoided token
/// outside the row.
void adjust_logits(std::span<float> logits, const Adjustment& adjustment);

}  // namespace hadal::ops
