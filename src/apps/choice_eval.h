// Multiple choice by likelihood: which of several continuations of a context a model gives most
// probability, as lm-evaluation-harness counts it.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "apps/loaded_model.h"

namespace hadal::apps {

struct ChoiceOptions {
  std::string delimiter = " ";  ///< between context and choice
  bool bos = true;              ///< before every context; an empty context always has it
  bool special_tokens = false;  ///< recognised in the texts; else they are text
  int64_t step_tokens = 8192;   ///< a forward pass at most, for memory
  int64_t max_lines = 0;        ///< 0: all
};

/// One continuation.
struct ChoiceScore {
  double logprob = 0;  ///< sum over its tokens, in order
  int64_t tokens = 0;
  bool greedy = true;  ///< each of its tokens is the likeliest
};

struct Question {
  std::vector<ChoiceScore> choices;
  std::vector<int64_t> lengths;  ///< of the choices in characters, without the delimiter
  int64_t answer = 0;

  /// The likeliest choice, by the sum and by the sum for each character; the first of equals.
  int64_t best() const;
  int64_t best_by_length() const;
};

/// Scores {"context": text, "choices": [texts], "answer": index or text} line by line. Tokens are
/// cut as lm-evaluation-harness cuts them: context and choice are encoded together, white space at
/// the context's end belongs to the choice. `on_question` gets each, in order. InputErrors name
/// file and line.
void score_choices(const LoadedModel& loaded,
                   const std::string& path,
                   const ChoiceOptions& options,
                   const std::function<void(const Question&)>& on_question);

}  // namespace hadal::apps
