// Chat encoding: OpenAI-style messages to the prompt string, byte for byte as the official encoder
// (chat_encoding.md).
//
// Messages are JSON objects with `role` (system, developer, user, assistant, tool, latest_reminder)
// and, by role, `content`, `reasoning_content`, `tool_calls`, `tools`, `response_format`, `task`,
// `wo_eos`, `tool_call_id`. The prompt is meant for Tokenizer::encode: with
// SpecialTokens::kRecognise if whoever wrote the messages may write special strings, too, else with
// the ranges of render_chat(). All functions are pure; bad messages are InputErrors that name the
// message.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "text/python_json.h"
#include "text/tokenizer.h"

namespace hadal::text {

struct RawMarkup;
struct ToolCall;

enum class ThinkingMode : uint8_t { kChat, kThinking };
/// kNone: not said.
enum class ReasoningEffort : uint8_t { kNone, kLow, kHigh, kMax };
/// What a level of effort means differs between checkpoints; nothing but their encoders says so
/// (checkpoints.md). In thinking mode only:
///   kPreview  low (which its encoder refuses) and high are as nothing; max adds a prefix
///   k0731     low is as nothing; high adds the prefix of the preview's max, max another one
enum class EffortLevels : uint8_t { kPreview, k0731 };

struct ChatOptions {
  ThinkingMode thinking_mode = ThinkingMode::kThinking;
  ReasoningEffort effort = ReasoningEffort::kNone;
  EffortLevels levels = EffortLevels::kPreview;
  bool drop_thinking = true;  ///< drop the reasoning of earlier turns, unless a message has tools
  bool add_bos = true;        ///< BOS first (never with a context)
  /// The markup of an earlier call as the model wrote it, by the call's id; empty: as we write it.
  std::function<std::optional<RawMarkup>(std::string_view id, const ToolCall& call)> recall = {};
};

/// "chat" or "thinking". Errors: InputError for anything else.
ThinkingMode parse_thinking_mode(std::string_view name);
/// What the encoder of these levels takes: "", "none", "high" or "max"; with 0731's "", "low",
/// "high" or "max". Errors: InputError for anything else.
ReasoningEffort parse_reasoning_effort(std::string_view name,
                                       EffortLevels levels = EffortLevels::kPreview);
/// "preview" or "0731". Errors: InputError for anything else.
EffortLevels parse_effort_levels(std::string_view name);
const char* effort_levels_name(EffortLevels levels);

/// A prompt, and where it holds what the messages brought: for Tokenizer::encode(text, foreign),
/// which takes special strings there as ordinary text.
struct ChatPrompt {
  std::string text;
  /// Contents, reasoning, schemas, names, keys and values of calls; ascending, none empty.
  std::vector<TextRange> foreign;

  void add_foreign(std::string_view more);  ///< appends a part that is foreign
};

ChatPrompt render_chat(const PyJson& messages,
                       const ChatOptions& options,
                       const PyJson& context = PyJson::array());

/// The prompt of a list of messages: render_chat().text.
///   context  earlier messages whose prompt exists already: only `messages` are rendered,
///            without BOS, but knowing them
std::string encode_chat(const PyJson& messages,
                        const ChatOptions& options,
                        const PyJson& context = PyJson::array());

/// The messages of a request: a list as it is, or {messages, tools} with the tools attached to the
/// first message.
PyJson messages_of_request(PyJson request);

}  // namespace hadal::text
