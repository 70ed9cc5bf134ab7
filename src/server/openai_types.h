// OpenAI's wire objects: usage, logprobs, errors, and the formats of chat and text completions.
#pragma once

#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "server/generation.h"

namespace hadal::server {

HttpResponse openai_error(const RequestError& error);
Json openai_usage(const Answer& answer);
/// How long it took: {"first_token_ms", "total_ms", "tokens_per_second"}.
Json timings_json(const Answer& answer);
/// Adds "notes" to an answer that has some.
void add_notes(const std::vector<std::string>& notes, Json& answer);
/// "stop", "length" or "tool_calls".
std::string openai_finish(const Choice& choice);
/// Appends "data: ...\n\n", with an "event:" line if `event` is not empty.
void write_sse(std::string& out, const Json& data, std::string_view event = {});
/// A logprob JSON can hold: minus infinity becomes a number no token reaches.
double finite_logprob(double logprob);
/// Chat's list of tokens, from `from` on.
Json logprob_list(const text::Tokenizer& tokenizer,
                  const std::vector<engine_core::OutputToken>& tokens,
                  size_t from,
                  bool ids_as_tokens = false);
Json id_list(const std::vector<int64_t>& ids, size_t from = 0);
Json number_list(const std::vector<double>& numbers, size_t from = 0);

/// A prompt as an answer shows it again.
struct TextPrompt {
  std::string text;
  std::vector<int64_t> tokens;
  size_t hidden = 0;  ///< the first so many tokens are not in the text: a BOS that we put there
};

struct OpenAiFormatOptions {
  bool include_usage = false;
  bool usage_in_chunks = false;
  bool logprobs = false;
  int64_t top_logprobs = 0;
  int64_t prompt_logprobs = -1;   ///< vLLM's list of the prompt's, so many of each; -1: none
  bool token_ids = false;         ///< vLLM's lists of ids
  bool sampled_logprobs = false;  ///< lists of the tokens' in the distributions drawn from
  bool ids_as_tokens = false;     ///< logprobs name tokens "token_id:N"
  bool hide_special = false;      ///< added tokens that the model draws are not in the text
  bool echo = false;              ///< text completions: each prompt's text and logprobs first
  std::vector<TextPrompt> prompts;
  int64_t choices_per_prompt = 1;
  std::vector<int64_t> ends;           ///< tokens that end an answer and are not in its text
  std::vector<std::string> notes;      ///< what was asked for and left out
  std::set<std::string> custom_tools;  ///< called with one text instead of JSON
};
std::unique_ptr<Format> chat_completion_format(const text::Tokenizer& tokenizer,
                                               OpenAiFormatOptions options);
std::unique_ptr<Format> text_completion_format(const text::Tokenizer& tokenizer,
                                               OpenAiFormatOptions options);

/// The four parallel lists of a text completion's logprobs, made piece by piece. Offsets count
/// characters; that of a token that begins inside a character is the character's.
class TextLogprobs {
 public:
  TextLogprobs(const text::Tokenizer& tokenizer, const OpenAiFormatOptions& options)
      : tokenizer_(&tokenizer), options_(&options) {}
  void add_prompt(const TextPrompt& prompt, const std::vector<engine_core::TokenScore>& scores);
  void add(const engine_core::OutputToken& token);
  /// What was added since the last time; null: nothing.
  Json take();

 private:
  std::string name(int64_t token) const;
  void add_entry(int64_t token, Json value, Json top, bool in_text);
  Json top_of(int64_t token, double logprob, const std::vector<TokenLogprob>& top) const;

  const text::Tokenizer* tokenizer_;
  const OpenAiFormatOptions* options_;
  Json names_ = Json::array(), values_ = Json::array(), tops_ = Json::array(),
       offsets_ = Json::array();
  int64_t characters_ = 0;
};

/// vLLM's `prompt_logprobs`: null for the first token, then an object by token id.
Json prompt_logprobs_json(const text::Tokenizer& tokenizer,
                          const OpenAiFormatOptions& options,
                          const TextPrompt& prompt,
                          const std::vector<engine_core::TokenScore>& scores);

}  // namespace hadal::server
