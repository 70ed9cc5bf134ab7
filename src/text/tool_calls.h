// Tool calls in DSML, the markup of V4: written into prompts, read out of completions
// (chat_encoding.md 4, 5).
//
// parse_completion() reads a whole completion in which literals stand for special tokens, by the
// rules of CompletionParser (completion_parser.h). Malformed output of a model is an expected
// outcome, so it is a value, no exception.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/chat_format.h"

namespace hadal::text {

/// Markup as it was written: what `special` covers are special tokens, the rest is ordinary text.
struct RawMarkup {
  std::string text = {};
  std::vector<TextRange> special = {};
};

struct ToolCall {
  std::string name;
  std::string arguments;  ///< JSON text of an object
  RawMarkup raw = {};     ///< of a call that was read: from its opening tag to its closing one

  friend bool operator==(const ToolCall& a, const ToolCall& b) {
    return a.name == b.name && a.arguments == b.arguments;
  }
};

/// The block `<|DSML|tool_calls> ... </|DSML|tool_calls>` (without the blank line before it). A
/// call that has `raw` is written so. Arguments that are no JSON object become one string parameter
/// `arguments`, as they are.
std::string write_tool_calls(std::span<const ToolCall> calls);
/// Appends the same; names, keys and values become ranges of prompt.foreign.
void write_tool_calls(std::span<const ToolCall> calls, ChatPrompt& prompt);

struct Completion {
  bool ok = false;    ///< all of it is as the encoder would have written it
  std::string error;  ///< what is wrong first, what is lost before what is unusual; empty if ok
  bool lost = false;  ///< something is not here: a call that is incomplete, a stray piece of markup
  bool cut = false;   ///< without EOS it ends inside a call, or there is none
  bool open_reasoning = false;  ///< EOS came inside the reasoning; lost, too
  std::string reasoning;
  std::string content;
  std::vector<ToolCall> tool_calls;

  /// {"role": "assistant", "content", "reasoning_content", "tool_calls"} in OpenAI form.
  PyJson to_json() const;
};

/// Reads what a model wrote after the transition, EOS included; special tokens are recognised by
/// their literals. Invalid UTF-8 is repaired.
Completion parse_completion(std::string_view text, ThinkingMode mode);

/// The first special token in `text` that has a meaning in a completion: its place and length. At
/// the end: text.size() and 0.
std::pair<size_t, size_t> find_special(std::string_view text);

/// Strings that may stand in neither reasoning nor content, in no order.
std::span<const std::string_view> forbidden_in_text();
/// "\n\n<|DSML|tool_calls": ends the content, begins the block.
std::string_view tool_block_start();

namespace dsml {
extern const std::string_view kBlockEnd;      ///< </|DSML|tool_calls>
extern const std::string_view kInvoke;        ///< <|DSML|invoke
extern const std::string_view kInvokeEnd;     ///< </|DSML|invoke
extern const std::string_view kParameter;     ///< <|DSML|parameter
extern const std::string_view kParameterEnd;  ///< /|DSML|parameter
extern const std::string_view kTagEnd;        ///< ">" and a newline
}  // namespace dsml

}  // namespace hadal::text
