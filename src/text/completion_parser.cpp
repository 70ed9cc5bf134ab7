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
  // In slices, since every step moves what is left of the buffer.
  for (size_t pos = 0; pos < text.size() && !malformed(); pos += kSlice) {
    take(std::string_view(text).substr(pos, kSlice), events);
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
    events.push_back({kind, std::string(text), {}});
  }
  buffer_.erase(0, count);
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

/// Takes the text up to the earlier of two stop strings, and that stop string, out of the buffer.
bool CompletionParser::collect(std::string_view first,
                               std::string_view second,
                               std::string& text,
                               bool& is_first) {
  const size_t at_first = buffer_.find(first, scanned_);
  const size_t at_second = buffer_.find(second, scanned_);
  const size_t pos = std::min(at_first, at_second);
  if (pos == std::string::npos) {
    const size_t overlap = std::max(first.size(), second.size()) - 1;
    scanned_ = buffer_.size() > overlap ? buffer_.size() - overlap : 0;
    return false;
  }
  is_first = at_first < at_second;
  text = buffer_.substr(0, pos);
  buffer_.erase(0, pos + (is_first ? first : second).size());
  scanned_ = 0;
  return true;
}

bool CompletionParser::step_calls(std::vector<CompletionEvent>& events) {
  static const std::string tag_invoke = concat(dsml::kTagEnd, dsml::kInvoke);
  static const std::string tag_block_end = concat(dsml::kTagEnd, dsml::kBlockEnd);
  static const std::string tag_parameter = concat(dsml::kTagEnd, dsml::kParameter);
  static const std::string tag_invoke_end = concat(dsml::kTagEnd, dsml::kInvokeEnd);
  const auto end_call = [&] {
    result_.tool_calls.push_back(call_.close());
    events.push_back({CompletionEvent::Kind::kToolCall, {}, result_.tool_calls.back()});
    state_ = State::kBetweenCalls;
    return true;
  };
  std::string text;
  bool is_first = false;
  switch (state_) {
    case State::kBetweenCalls: {
      const std::array<std::string_view, 2> literals = {tag_invoke, tag_block_end};
      const Literal found = expect(literals);
      if (found == kNone) return fail("unexpected text between tool calls");
      if (found == kOpen) return false;
      state_ = found == 0 ? State::kHead : State::kAfterBlock;
      return true;
    }
    case State::kHead:
      if (!collect(dsml::kParameter, dsml::kInvokeEnd, text, is_first)) return false;
      if (!call_.open(text)) return fail("a tool call has no name");
      if (!is_first) return end_call();
      state_ = State::kParameter;
      return true;
    case State::kParameter:
      if (!collect(dsml::kParameterEnd, dsml::kParameterEnd, text, is_first)) return false;
      if (!call_.add(text)) return fail("a parameter is malformed or repeated");
      state_ = State::kAfterParameter;
      return true;
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
