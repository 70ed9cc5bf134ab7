// Tool calls in DSML, the markup of V4: written into prompts, read out of completions
// (model.md 6.4, 6.6).
//
// parse_completion() reads a whole completion and accepts well-formed ones only; CompletionParser
// (completion_parser.h) gives the same result from pieces. Malformed output of a model is an
// expected outcome, so it is a value, no exception.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "text/chat_format.h"

namespace hadal::text {

struct ToolCall {
  std::string name;
  std::string arguments;  ///< JSON text of an object; values the model marked as no strings are
                          ///< copied unchecked

  friend bool operator==(const ToolCall&, const ToolCall&) = default;
};

/// The block `<|DSML|tool_calls> ... </|DSML|tool_calls>` (without the blank line before it).
/// Arguments that are no JSON become one string parameter `arguments`. Errors: InputError if they
/// are JSON but no object.
std::string write_tool_calls(std::span<const ToolCall> calls);
/// Appends the same; names, keys and values become ranges of prompt.foreign.
void write_tool_calls(std::span<const ToolCall> calls, ChatPrompt& prompt);

struct Completion {
  bool ok = false;
  std::string error;  ///< what is malformed; empty if ok
  std::string reasoning;
  std::string content;
  std::vector<ToolCall> tool_calls;

  /// {"role": "assistant", "content", "reasoning_content", "tool_calls"} in OpenAI form.
  PyJson to_json() const;
};

/// Reads what a model wrote after the transition, EOS included. Invalid UTF-8 is repaired first.
Completion parse_completion(std::string_view text, ThinkingMode mode);

// --- the parts both parsers share
// -------------------------------------------------------------------

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
extern const std::string_view kName;          ///< name="
extern const std::string_view kAsString;      ///< " string="true">: ends a key, begins a string
extern const std::string_view kAsJson;        ///< " string="false">: ends a key, begins JSON

/// Reads what stands between kInvoke and the next tag; false if it is no ` name="..."` and tag end.
bool read_head(std::string_view head, std::string& name);
/// Removes `end` and the newline that Python's `$` allows behind it; false if it is not there.
bool strip_end(std::string_view& text, std::string_view end);

/// Collects the parameters of one call.
class CallBuilder {
 public:
  bool open(std::string_view head);  ///< read_head()
  /// Takes what stands between kParameter and kParameterEnd; false if it is malformed or the key is
  /// there already.
  bool add(std::string_view parameter);
  ToolCall close();

 private:
  struct Parameter {
    std::string key;
    std::string value;  ///< JSON text
  };
  std::string name_;
  std::vector<Parameter> parameters_;
};
}  // namespace dsml

}  // namespace hadal::text
