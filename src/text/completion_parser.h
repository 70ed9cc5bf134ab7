// Reads a completion while it is generated: reasoning, content and tool calls out of pieces cut
// anywhere.
//
// For every way of cutting, finish() gives what parse_completion() gives for the whole; the text
// events concatenated are its reasoning and content, the pieces of a call its arguments. Text that
// may yet turn out to be markup is held back, so markup never shows up in an event. Malformed
// output stops the events, maybe inside a call; finish() says what was wrong. One parser reads one
// completion on one thread.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "text/chat_format.h"
#include "text/tool_calls.h"
#include "text/utf8.h"

namespace hadal::text {

struct CompletionEvent {
  enum class Kind : uint8_t {
    kReasoning,
    kContent,
    kCallBegin,  ///< call.name is known
    kArguments,  ///< more of the call's arguments
    kToolCall,   ///< the call is complete
  };
  Kind kind = Kind::kContent;
  /// More reasoning, content or arguments: whole characters. Empty only where a value begins that
  /// is copied unchecked.
  std::string text;
  ToolCall call;
  bool unchecked = false;  ///< kArguments: of a value that is copied, not one of ours
};

class CompletionParser {
 public:
  explicit CompletionParser(ThinkingMode mode);

  /// Adds bytes, cut anywhere, also inside a character; returns what they complete.
  std::vector<CompletionEvent> push(std::string_view bytes);

  /// Whether what came so far cannot become well-formed any more.
  bool malformed() const { return state_ == State::kMalformed; }

  /// Ends the completion (EOS included, where there was one). Of a completion that was cut off,
  /// `events` gets the text still held back, and the result is malformed with all that was read.
  /// Call it once, after the last push().
  Completion finish(std::vector<CompletionEvent>& events);

 private:
  enum class State : uint8_t {
    kReasoning,
    kContent,
    kBetweenCalls,    ///< behind the block's opening or a call: a tag end, then a call or the end
    kHead,            ///< inside <invoke
    kParameter,       ///< inside <parameter, before the value
    kValue,           ///< inside a parameter's value
    kAfterParameter,  ///< a tag end, then a parameter or the end of the call
    kAfterBlock,      ///< EOS or nothing
    kDone,            ///< nothing
    kMalformed,
  };
  /// Index of the literal the buffer begins with; kNone of them, or kOpen while more bytes could
  /// decide.
  enum Literal : int { kNone = -1, kOpen = -2 };

  void take(std::string_view text, std::vector<CompletionEvent>& events);
  bool step(std::vector<CompletionEvent>& events);
  bool step_text(std::vector<CompletionEvent>& events);
  void end_text(std::string_view marker);
  bool step_calls(std::vector<CompletionEvent>& events);
  Literal expect(std::span<const std::string_view> literals);
  Literal collect(std::span<const std::string_view> stops, std::string& text);
  bool step_value(std::vector<CompletionEvent>& events);
  bool begin_value(std::string_view head, bool is_string, std::vector<CompletionEvent>& events);
  void emit_arguments(std::string text, bool unchecked, std::vector<CompletionEvent>& events);
  void emit_text(size_t count, std::vector<CompletionEvent>& events);
  bool fail(std::string error);

  State state_;
  Utf8Stream utf8_;
  std::string buffer_;  ///< what is not consumed yet
  size_t scanned_ = 0;  ///< bytes of the buffer in which no stop string begins
  ToolCall call_;       ///< the call under way
  std::vector<std::string> keys_;
  bool string_value_ = false;
  Completion result_;
};

}  // namespace hadal::text
