// The text of one answer as its tokens come: decoding, and stop strings in what readers see.
//
// In a structured answer (Request::structured) added tokens are structure: they give no text, what
// was held back before one comes out with it, and stop strings are looked for in the content alone:
// neither in the reasoning, nor from the first marker of tool calls on, nor in the white space and
// bracket before it, which are held back until it is clear whose they are. Otherwise every token is
// text. One AnswerText belongs to one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "engine_core/answer/stop.h"
#include "engine_core/request.h"
#include "text/tokenizer.h"

namespace hadal::engine_core {

class AnswerText {
 public:
  /// `tokenizer` must outlive it. Errors: InputError for an empty stop string.
  AnswerText(const text::Tokenizer& tokenizer, const Request& request);

  /// Adds a token; returns what is certain now. Nothing once stopped().
  std::string push(int64_t token);
  /// Ends the answer; returns what was held back. Call it once.
  std::string finish();

  bool in_reasoning() const { return part_ == Part::kReasoning; }
  int64_t reasoning_tokens() const { return reasoning_tokens_; }
  int64_t think_end() const { return think_end_; }  ///< -1: the tokenizer has none
  bool stopped() const { return stream_.stopped(); }
  const std::optional<std::string>& matched() const { return stream_.matched(); }

 private:
  enum class Part : uint8_t { kReasoning, kContent, kMarkup };

  std::string push_content(std::string_view bytes);
  std::string flush();

  const text::Tokenizer& tokenizer_;
  const bool structured_;
  int64_t think_end_ = -1, marker_ = -1;
  Part part_ = Part::kContent;
  int64_t reasoning_tokens_ = 0;
  StopStream stream_;       ///< of the content
  text::Utf8Stream plain_;  ///< of what is not
  std::string gap_;         ///< white space and a bracket that may belong to a call
};

}  // namespace hadal::engine_core
