// Reads a completion while it is generated: reasoning, content and tool calls out of pieces cut
// anywhere.
//
// Structure is decided by special tokens alone: push_special() brings them by their content, push()
// brings ordinary text, in which the same letters mean nothing. `</think>` ends the reasoning, the
// DSML marker makes the `<` or `</` before it and the text behind it a tag, EOS ends the
// completion. Other special tokens are left out of the text (in the value of a parameter they are
// text).
//
// A call is delivered when it is complete: its head has a name, its parameters and it itself are
// closed. Where the tags stand, what white space is between them, and whether there is a block
// around them do not matter; a block inside the reasoning ends it. What is not complete is left out
// and `lost`. Completion::ok says whether all was as the encoder would have written it
// (chat_encoding.md 5).
//
// For every way of cutting, the events concatenated are the result. Text that may yet turn out to
// belong to a tag is held back, so markup never shows up in an event; so are calls until they are
// complete or their arguments exceed `hold_bytes`. One parser reads one completion on one thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "text/call_values.h"
#include "text/chat_format.h"
#include "text/dsml_tag.h"
#include "text/tool_calls.h"
#include "text/utf8.h"

namespace hadal::text {

struct CompletionEvent {
  enum class Kind : uint8_t {
    kReasoning,
    kContent,
    kCallBegin,    ///< call.name is known
    kArguments,    ///< more of the call's arguments
    kToolCall,     ///< the call is complete
    kCallDropped,  ///< the call that was begun will not be complete
  };
  Kind kind = Kind::kContent;
  std::string text;  ///< more reasoning, content or arguments: whole characters, never empty
  ToolCall call;
};

/// How many bytes at the end of a visible text may belong to a tag that a marker would begin: white
/// space and `<` or `</`.
size_t bytes_before_tag(std::string_view text);

struct CompletionParserOptions {
  std::shared_ptr<const ToolSchemas> tools;  ///< null: nothing is known of the tools
  /// Arguments up to so many bytes are told with the call's end; of longer ones the client sees
  /// progress. 0 where a grammar makes sure that calls become complete.
  size_t hold_bytes = 1024;
};

class CompletionParser {
 public:
  explicit CompletionParser(ThinkingMode mode, CompletionParserOptions options = {});

  /// Adds bytes of ordinary text, cut anywhere, also inside a character; returns what they
  /// complete.
  std::vector<CompletionEvent> push(std::string_view bytes);
  /// Adds a special token.
  std::vector<CompletionEvent> push_special(std::string_view token);
  /// Adds a token of either kind.
  std::vector<CompletionEvent> push_token(const Tokenizer& tokenizer, int32_t id);

  /// Ends the completion. `events` gets what was still held back; of a completion without EOS,
  /// which was cut off, also what there is of an open call. Call it once, after the last push.
  Completion finish(std::vector<CompletionEvent>& events);

 private:
  enum class Mode : uint8_t {
    kText,   ///< reasoning or content; also between calls
    kTag,    ///< behind a marker
    kCall,   ///< inside a call, between its parameters
    kValue,  ///< inside a parameter
    kSkip,   ///< inside something broken, up to the next tag that means something
    kDone,   ///< behind EOS
  };
  using Events = std::vector<CompletionEvent>;

  void take(std::string_view text, Events& events);
  void take_text(std::string_view text, Events& events);
  size_t take_tag(std::string_view text, Events& events);
  void take_value(std::string_view text, Events& events);
  void marker(Events& events);
  void end_of_sentence(Events& events);
  bool strip_bracket();
  void handle_tag(const dsml::Tag& tag, Events& events);
  void open_tag(const dsml::Tag& tag, Events& events);
  void close_tag(const dsml::Tag& tag, Events& events);
  void broken_tag(Events& events);
  void begin_markup(Events& events);
  bool is_gap(std::string_view gap, bool closing) const;
  void begin_call(const dsml::Tag& tag, Events& events);
  void begin_value(const dsml::Tag& tag, Events& events);
  void end_value(Events& events);
  void end_call(Events& events);
  void drop_call(std::string_view why, Events& events);
  void emit(CompletionEvent::Kind kind, std::string_view text, Events& events);
  void emit_arguments(std::string text, Events& events);
  void flush_text(Events& events);
  void record(std::string_view text);
  void release(Events& events);
  void lose(std::string_view why);
  void irregular(std::string_view why);
  void end_completion(Events& events);

  const CompletionParserOptions options_;
  Mode mode_ = Mode::kText, outer_ = Mode::kText;  ///< outer_: around the tag
  bool reasoning_;
  bool after_markup_ = false;  ///< white space here belongs to the markup, if nothing else comes
  bool in_block_ = false, had_block_ = false;
  enum class Last : uint8_t { kText, kBlock, kInvoke, kParameterEnd, kInvokeEnd, kBlockEnd };
  Last last_ = Last::kText;  ///< the tag before, which says what may stand before the next
  Utf8Stream utf8_;
  std::string pending_;  ///< held back: white space and a bracket
  std::string tag_;
  bool tag_closing_ = false;
  ToolCall call_;  ///< under way
  Events held_;    ///< of it
  size_t held_bytes_ = 0;
  bool begun_ = false;      ///< its events are told
  bool recording_ = false;  ///< its markup
  std::vector<std::string> keys_;
  std::string value_;  ///< held until its end
  bool hold_value_ = false, string_value_ = false, wrapper_ = false;
  std::string wrapped_;  ///< the value of what may be a wrapper of all parameters
  Completion result_;
};

}  // namespace hadal::text
