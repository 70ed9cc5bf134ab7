// OpenAI's wire objects: usage, logprobs, errors, and the formats of chat and text completions.
#pragma once

#include <memory>
#include <string>

#include "server/generation.h"

namespace hadal::server {

HttpResponse openai_error(const RequestError& error);
Json openai_usage(const Answer& answer);
/// "stop", "length" or "tool_calls".
std::string openai_finish(const Choice& choice);
/// Appends "data: ...\n\n", with an "event:" line if `event` is not empty.
void write_sse(std::string& out, const Json& data, std::string_view event = {});

struct OpenAiFormatOptions {
  bool include_usage = false;
  bool logprobs = false;
  std::vector<std::string> echo;  ///< text completions: each prompt's text, repeated first
  int64_t choices_per_prompt = 1;
};
std::unique_ptr<Format> chat_completion_format(const text::Tokenizer& tokenizer,
                                               OpenAiFormatOptions options);
std::unique_ptr<Format> text_completion_format(const text::Tokenizer& tokenizer,
                                               OpenAiFormatOptions options);

}  // namespace hadal::server
