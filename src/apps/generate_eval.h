// Answers that a model writes, compared with the right ones: what lm-evaluation-harness does with
// generate_until and exact_match.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "apps/loaded_model.h"

namespace hadal::apps {

struct GenerateOptions {
  int64_t max_tokens = 256;
  std::vector<std::string> until;  ///< the text ends before the first of them
  bool chat = false;               ///< the context is a user's message; else plain text
  bool thinking = false;           ///< with chat: what counts is the text behind the reasoning
  bool bos = true;                 ///< without chat: before the context
  int64_t max_lines = 0;           ///< 0: all
};

struct GeneratedAnswer {
  std::string text, answer;
  std::string finish;  ///< "stop" or "length"
  int64_t tokens = 0;

  bool exact() const { return text == answer; }
  /// White space around either left out.
  bool same_words() const;
};

/// Lets the model go on from {"context": text, "answer": text, "until": [texts]?} line by line,
/// always with the most likely token, several at a time. `on_answer` gets each, in order.
/// InputErrors name file and line.
void generate_answers(const LoadedModel& loaded,
                      const std::string& path,
                      const GenerateOptions& options,
                      const std::function<void(const GeneratedAnswer&)>& on_answer);

}  // namespace hadal::apps
