#include "text/completion_parser.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/check.h"
#include "text/chat_tokens.h"

namespace hadal::text {
namespace {

constexpr std::string_view kTagOpen = "<\uff5cDSML\uff5c";
constexpr std::string_view kTagClose = "</\uff5cDSML\uff5c";

/// What ends a stretch of text or is forbidden in it. The two tag beginnings hold back the bracket
/// in front of the forbidden token; the token itself comes last, for text that has it without a
/// bracket.
const std::array<std::string_view, 8>& text_markers() {
  static const std::array<std::string_view, 8> markers = {
      tool_block_start(), kEos, kThinkEnd, kThinkStart, kBos, kTagOpen, kTagClose, kDsml};
  return markers;
}

constexpr size_t kSlice = 4096;

enum class Fit : uint8_t { kWhole, kPartial, kNot };

/// How `literal` fits the beginning of `text`.
Fit fit(std::string_view text, std::string_view literal) {
  if (text.starts_with(literal)) return Fit::kWhole;
  return literal.starts_with(text) ? Fit::kPartial : Fit::kNot;
}

}  // namespace

CompletionParser::CompletionParser(ThinkingMode mode)
    : state_(mode == ThinkingMode::kThinking ? State::kReasoning : State::kContent) {}

std::vector<CompletionEvent> CompletionParser::push(std::string_view bytes) {
  std::vector<CompletionEvent> events;
  const std::string text = utf8_.push(bytes);
  // In slices of whole characters, since every step moves what is left of the buffer.
  for (size_t pos = 0; pos < text.size() && !malformed();) {
    size_t end = std::min(pos + kSlice, text.size());
    while (end < text.size() && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80) --end;
    take(std::string_view(text).substr(pos, end - pos), events);
    pos = end;
  }
  return events;
}

void CompletionParser::take(std::string_view text, std::vector<CompletionEvent>& events) {
  buffer_ += text;
  while (step(events)) {
  }
}

Completion CompletionParser::finish(std::vector<CompletionEvent>& events) {
  if (!malformed()) take(utf8_.flush(), events);
  switch (state_) {
    case State::kReasoning:
    case State::kContent:
      // What was held back turns out to be text, unless it is the beginning of a special token.
      if (buffer_.find("\uff5c") == std::string::npos) emit_text(buffer_.size(), events);
      fail(state_ == State::kReasoning
               ? "the reasoning does not end with </think>"
               : "the completion does not end with the end-of-sentence token");
      break;
    case State::kBetweenCalls:
      fail("the tool call block does not end");
      break;
    case State::kHead:
    case State::kAfterParameter:
      fail("a tool call does not end");
      break;
    case State::kParameter:
    case State::kValue:
      fail("a parameter does not end");
      break;
    case State::kAfterBlock:
      if (!buffer_.empty()) {
        fail("text follows the tool calls");
        break;
      }
      [[fallthrough]];
    case State::kDone:
      result_.ok = true;
      break;
    case State::kMalformed:
      break;
  }
  return std::move(result_);
}

bool CompletionParser::fail(std::string error) {
  state_ = State::kMalformed;
  result_.error = std::move(error);
  buffer_.clear();
  return false;
}

void CompletionParser::emit_text(size_t count, std::vector<CompletionEvent>& events) {
  if (count > 0) {
    const bool reasoning = state_ == State::kReasoning;
    const std::string_view text = std::string_view(buffer_).substr(0, count);
    (reasoning ? result_.reasoning : result_.content) += text;
    const auto kind =
        reasoning ? CompletionEvent::Kind::kReasoning : CompletionEvent::Kind::kContent;
    events.push_back({kind, std::string(text), {}, false});
  }
  buffer_.erase(0, count);
}

void CompletionParser::emit_arguments(std::string text,
                                      bool unchecked,
                                      std::vector<CompletionEvent>& events) {
  call_.arguments += text;
  const bool joins = !events.empty() && events.back().kind == CompletionEvent::Kind::kArguments &&
                     events.back().unchecked == unchecked;
  if (joins) {
    events.back().text += text;
  } else {
    events.push_back({CompletionEvent::Kind::kArguments, std::move(text), {}, unchecked});
  }
}

/// One transition; false when more bytes are needed or nothing more can come.
bool CompletionParser::step(std::vector<CompletionEvent>& events) {
  switch (state_) {
    case State::kReasoning:
    case State::kContent:
      return step_text(events);
    case State::kAfterBlock: {
      static constexpr std::array<std::string_view, 1> kEnd = {kEos};
      const Literal found = expect(kEnd);
      if (found == kNone) return fail("text follows the tool calls");
      if (found == kOpen) return false;
      state_ = State::kDone;
      return true;
    }
    case State::kDone:
      return buffer_.empty() ? false : fail("text follows the end-of-sentence token");
    case State::kMalformed:
      return false;
    default:
      return step_calls(events);
  }
}

bool CompletionParser::step_text(std::vector<CompletionEvent>& events) {
  const std::string_view text = buffer_;
  for (size_t pos = 0; pos < text.size(); ++pos) {
    // First bytes of all markers: '<', newline, and the lead byte of U+FF5C.
    pos = std::min(text.find_first_of("<\n\xEF", pos), text.size());
    if (pos == text.size()) break;
    bool partial = false;
    for (const std::string_view marker : text_markers()) {
      const Fit found = fit(text.substr(pos), marker);
      if (found == Fit::kWhole) {
        emit_text(pos, events);
        end_text(marker);
        return !malformed();
      }
      partial |= found == Fit::kPartial;
    }
    if (partial) {
      emit_text(pos, events);
      return false;
    }
  }
  emit_text(text.size(), events);
  return false;
}

/// The buffer begins with a whole marker: it ends the stretch or has no place here.
void CompletionParser::end_text(std::string_view marker) {
  const bool reasoning = state_ == State::kReasoning;
  if (reasoning && marker == kThinkEnd) {
    state_ = State::kContent;
  } else if (!reasoning && marker == kEos) {
    state_ = State::kDone;
  } else if (!reasoning && marker == tool_block_start()) {
    state_ = State::kBetweenCalls;
  } else if (reasoning && marker == tool_block_start()) {
    fail("the reasoning does not end with </think>");
    return;
  } else {
    const bool tag = marker == kTagOpen || marker == kTagClose;
    fail(concat("'", tag ? kDsml : marker, "' stands in the text"));
    return;
  }
  buffer_.erase(0, marker.size());
}

CompletionParser::Literal CompletionParser::expect(std::span<const std::string_view> literals) {
  bool partial = false;
  for (size_t i = 0; i < literals.size(); ++i) {
    const Fit found = fit(buffer_, literals[i]);
    if (found == Fit::kWhole) {
      buffer_.erase(0, literals[i].size());
      return static_cast<Literal>(i);
    }
    partial |= found == Fit::kPartial;
  }
  return partial ? kOpen : kNone;
}

/// Takes the text up to the earliest of some stop strings, and that one, out of the buffer.
CompletionParser::Literal CompletionParser::collect(std::span<const std::string_view> stops,
                                                    std::string& text) {
  size_t pos = std::string::npos, found = 0, overlap = 0;
  for (size_t i = 0; i < stops.size(); ++i) {
    overlap = std::max(overlap, stops[i].size() - 1);
    const size_t at = buffer_.find(stops[i], scanned_);
    if (at < pos) {
      pos = at;
      found = i;
    }
  }
  if (pos == std::string::npos) {
    scanned_ = buffer_.size() > overlap ? buffer_.size() - overlap : 0;
    return kOpen;
  }
  text = buffer_.substr(0, pos);
  buffer_.erase(0, pos + stops[found].size());
  scanned_ = 0;
  return static_cast<Literal>(found);
}

/// The value of a parameter, handed on but for what may begin its end.
bool CompletionParser::step_value(std::vector<CompletionEvent>& events) {
  // The bracket before kParameterEnd is no part of the value, nor a newline behind the bracket.
  static const std::array<std::string, 3> ends = {std::string(dsml::kParameterEnd),
                                                  concat("<", dsml::kParameterEnd),
                                                  concat("<\n", dsml::kParameterEnd)};
  const size_t end = buffer_.find(dsml::kParameterEnd);
  std::string_view value = std::string_view(buffer_).substr(0, end);
  // Without the bracket all of it is handed on, as other cuts would have done, before it fails.
  std::string_view stripped = value;
  const bool closed = end != std::string::npos && dsml::strip_end(stripped, "<");
  if (closed) {
    value = stripped;
  } else if (end == std::string::npos) {
    const auto begins_end = [&](size_t count) {
      const std::string_view last = value.substr(value.size() - count);
      return std::any_of(ends.begin(), ends.end(),
                         [&](const std::string& literal) { return literal.starts_with(last); });
    };
    size_t held = std::min(value.size(), ends.back().size() - 1);
    while (!begins_end(held)) --held;
    value.remove_suffix(held);
  }
  std::string text(value);
  if (string_value_) {
    text = quote_json(text);
    text = text.substr(1, text.size() - 2);
  }
  const size_t taken = value.size();
  if (!text.empty()) emit_arguments(std::move(text), !string_value_, events);
  if (end == std::string::npos) {
    buffer_.erase(0, taken);
    return false;
  }
  if (!closed) return fail("a parameter is malformed or repeated");
  if (string_value_) emit_arguments("\"", false, events);
  buffer_.erase(0, end + dsml::kParameterEnd.size());
  state_ = State::kAfterParameter;
  return true;
}

/// `head` stands between kParameter and the mark that ends the key.
bool CompletionParser::begin_value(std::string_view head,
                                   bool is_string,
                                   std::vector<CompletionEvent>& events) {
  if (!head.starts_with(' ') || !head.substr(1).starts_with(dsml::kName)) return false;
  std::string key(head.substr(1 + dsml::kName.size()));
  if (std::find(keys_.begin(), keys_.end(), key) != keys_.end()) return false;
  emit_arguments(concat(keys_.empty() ? "" : ", ", quote_json(key), is_string ? ": \"" : ": "),
                 false, events);
  if (!is_string) emit_arguments("", true, events);
  keys_.push_back(std::move(key));
  string_value_ = is_string;
  state_ = State::kValue;
  return true;
}

bool CompletionParser::step_calls(std::vector<CompletionEvent>& events) {
  static const std::string tag_invoke = concat(dsml::kTagEnd, dsml::kInvoke);
  static const std::string tag_block_end = concat(dsml::kTagEnd, dsml::kBlockEnd);
  static const std::string tag_parameter = concat(dsml::kTagEnd, dsml::kParameter);
  static const std::string tag_invoke_end = concat(dsml::kTagEnd, dsml::kInvokeEnd);
  const auto end_call = [&] {
    emit_arguments("}", false, events);
    events.push_back({CompletionEvent::Kind::kToolCall, {}, call_, false});
    result_.tool_calls.push_back(std::exchange(call_, {}));
    state_ = State::kBetweenCalls;
    return true;
  };
  std::string text;
  switch (state_) {
    case State::kBetweenCalls: {
      const std::array<std::string_view, 2> literals = {tag_invoke, tag_block_end};
      const Literal found = expect(literals);
      if (found == kNone) return fail("unexpected text between tool calls");
      if (found == kOpen) return false;
      state_ = found == 0 ? State::kHead : State::kAfterBlock;
      return true;
    }
    case State::kHead: {
      const std::array<std::string_view, 2> stops = {dsml::kParameter, dsml::kInvokeEnd};
      const Literal found = collect(stops, text);
      if (found == kOpen) return false;
      if (!dsml::read_head(text, call_.name)) return fail("a tool call has no name");
      events.push_back({CompletionEvent::Kind::kCallBegin, {}, {call_.name, {}}, false});
      emit_arguments("{", false, events);
      keys_.clear();
      if (found == 1) return end_call();
      state_ = State::kParameter;
      return true;
    }
    case State::kParameter: {
      const std::array<std::string_view, 3> stops = {dsml::kAsString, dsml::kAsJson,
                                                     dsml::kParameterEnd};
      const Literal found = collect(stops, text);
      if (found == kOpen) return false;
      if (found == 2 || !begin_value(text, found == 0, events))
        return fail("a parameter is malformed or repeated");
      return true;
    }
    case State::kValue:
      return step_value(events);
    default: {  // kAfterParameter
      const std::array<std::string_view, 2> literals = {tag_parameter, tag_invoke_end};
      const Literal found = expect(literals);
      if (found == kNone) return fail("unexpected text between parameters");
      if (found == kOpen) return false;
      if (found == 1) return end_call();
      state_ = State::kParameter;
      return true;
    }
  }
}

}  // namespace hadal::text
