// How answers were cut into tokens, so that their text is cut the same way when it comes back.
//
// A model may write a text in other tokens than the tokenizer would. Its client sends the text back
// as history, the tokenizer cuts it its own way, and from the first token that differs nothing of
// the conversation could be used again. So the engine remembers which tokens followed which prompt,
// and a server gives it the prompts that it made of text: where the bytes behind a remembered
// prompt are those of the answer, up to wherever they part, they become the answer's tokens. The
// model then reads what it wrote. Control tokens are compared as ids, never as text. Bounded in
// bytes; what was remembered first goes first. Thread-safe.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <shared_mutex>
#include <span>
#include <unordered_map>
#include <vector>

#include "text/tokenizer.h"

namespace hadal::engine_core {

class AnswerCuts {
 public:
  /// `tokenizer` outlives it.
  AnswerCuts(const text::Tokenizer& tokenizer, int64_t max_bytes)
      : tokenizer_(tokenizer), max_bytes_(max_bytes) {}

  void remember(std::span<const int64_t> prompt, std::span<const int64_t> answer);
  /// The same bytes and control tokens, cut as they were written where that is known.
  std::vector<int64_t> recall(std::span<const int64_t> prompt) const;
  int64_t num_bytes() const;
  int64_t max_bytes() const { return max_bytes_; }

 private:
  using Answers = std::list<std::vector<int32_t>>;
  /// Tokens of an answer and of a text that stand for the same.
  struct Aligned {
    size_t answer = 0, text = 0;
  };
  Aligned align(std::span<const int32_t> answer, std::span<const int64_t> text) const;
  static int64_t bytes_of(const std::vector<int32_t>& answer);

  const text::Tokenizer& tokenizer_;
  const int64_t max_bytes_;
  mutable std::shared_mutex mutex_;
  std::unordered_map<uint64_t, Answers> answers_;  ///< by the prompt's hash, latest first
  std::deque<uint64_t> order_;                     ///< hashes as their answers came
  int64_t bytes_ = 0;
};

}  // namespace hadal::engine_core
