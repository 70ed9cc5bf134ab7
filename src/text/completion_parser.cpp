#include "text/completion_parser.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "text/chat_tokens.h"

namespace hadal::text {
namespace {

using EventKind = CompletionEvent::Kind;

constexpr size_t kMaxGap = 256;   ///< bytes of white space held back before what may be a tag
constexpr size_t kMaxTag = 8192;  ///< bytes of a tag
constexpr size_t kMaxRaw = size_t{256} << 10;  ///< bytes of a call's markup that are kept

bool is_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

bool is_blank(std::string_view text) { return std::all_of(text.begin(), text.end(), is_space); }

/// bytes_before_tag() of a value, whose white space is its own.
size_t held_value(std::string_view text) {
  for (const std::string_view end : {"<\n/", "</", "<\n", "<", "/"}) {
    if (text.ends_with(end)) return end.size();
  }
  return 0;
}

}  // namespace

size_t bytes_before_tag(std::string_view text) {
  size_t bracket = 0;
  if (text.ends_with('<')) bracket = 1;
  if (text.ends_with("</")) bracket = 2;
  size_t gap = 0;
  const size_t limit = std::min(text.size() - bracket, kMaxGap);
  while (gap < limit && is_space(text[text.size() - bracket - gap - 1])) ++gap;
  return bracket + gap;
}

CompletionParser::CompletionParser(ThinkingMode mode, CompletionParserOptions options)
    : options_(std::move(options)), reasoning_(mode == ThinkingMode::kThinking) {}

std::vector<CompletionEvent> CompletionParser::push(std::string_view bytes) {
  Events events;
  take(utf8_.push(bytes), events);
  return events;
}

std::vector<CompletionEvent> CompletionParser::push_special(std::string_view token) {
  Events events;
  take(utf8_.flush(), events);
  if (const size_t at = token.find(kDsml); at != std::string_view::npos) {
    // A vocabulary may have more of a tag in one token.
    take(token.substr(0, at), events);
    marker(events);
    const std::string_view rest = token.substr(at + kDsml.size());
    if (rest.find(kDsml) != std::string_view::npos) {
      for (CompletionEvent& event : push_special(rest)) events.push_back(std::move(event));
    } else {
      take(rest, events);
    }
  } else if (token == kEos) {
    end_of_sentence(events);
  } else if (mode_ == Mode::kValue) {
    irregular(concat("'", token, "' stands in a value"));
    take_value(token, events);
  } else if (mode_ == Mode::kText && token == kThinkEnd && reasoning_) {
    flush_text(events);
    reasoning_ = false;
  } else {
    const bool opens = mode_ == Mode::kText && token == kThinkStart && !reasoning_ &&
                       result_.content.empty() && result_.tool_calls.empty() && is_blank(pending_);
    if (opens) pending_.clear();
    if (mode_ == Mode::kText) flush_text(events);
    reasoning_ = reasoning_ || opens;
    irregular(concat("'", token, "' stands in the text"));
  }
  return events;
}

std::vector<CompletionEvent> CompletionParser::push_token(const Tokenizer& tokenizer, int32_t id) {
  const std::string_view bytes = tokenizer.token_bytes(id);
  return tokenizer.is_added(id) ? push_special(bytes) : push(bytes);
}

void CompletionParser::take(std::string_view text, Events& events) {
  while (!text.empty()) {
    switch (mode_) {
      case Mode::kText:
        return take_text(text, events);
      case Mode::kValue:
        return take_value(text, events);
      case Mode::kCall:
        record(text);
        pending_ += text;
        return;
      case Mode::kSkip:
        pending_.append(text);
        pending_.erase(0, pending_.size() - std::min<size_t>(pending_.size(), 3));
        return;
      case Mode::kTag:
        text.remove_prefix(take_tag(text, events));
        break;
      case Mode::kDone:
        return lose("text follows the end-of-sentence token");
    }
  }
}

void CompletionParser::take_text(std::string_view text, Events& events) {
  if (!pending_.empty()) {
    pending_ += text;
    text = pending_;
  }
  const size_t shown = text.size() - bytes_before_tag(text);
  if (shown > 0) {
    if (in_block_ || after_markup_) irregular("text stands between or behind the tool calls");
    after_markup_ = false;
    emit(reasoning_ ? EventKind::kReasoning : EventKind::kContent, text.substr(0, shown), events);
  }
  if (pending_.empty()) {
    pending_ = text.substr(shown);
  } else {
    pending_.erase(0, shown);
  }
}

void CompletionParser::take_value(std::string_view text, Events& events) {
  record(text);
  if (!pending_.empty()) {
    pending_ += text;
    text = pending_;
  }
  const size_t shown = text.size() - held_value(text);
  const std::string_view value = text.substr(0, shown);
  if (hold_value_) {
    value_ += value;
  } else if (shown > 0) {
    std::string quoted = quote_json(value);
    quoted.pop_back();
    quoted.erase(0, 1);
    emit_arguments(std::move(quoted), events);
  }
  if (pending_.empty()) {
    pending_ = text.substr(shown);
  } else {
    pending_.erase(0, shown);
  }
}

/// Takes `<`, `</` or nothing off the end of what is held back: the marker's tag begins there.
bool CompletionParser::strip_bracket() {
  tag_closing_ = false;
  const bool in_value = mode_ == Mode::kValue;
  for (const std::string_view end : {"</", "<\n/", "/"}) {
    if (!pending_.ends_with(end) || (!in_value && end != "</")) continue;
    tag_closing_ = true;
    pending_.resize(pending_.size() - end.size());
    return end != "/";
  }
  if (!pending_.ends_with('<')) return false;
  pending_.pop_back();
  return true;
}

void CompletionParser::marker(Events& events) {
  if (mode_ == Mode::kDone) return lose("text follows the end-of-sentence token");
  if (mode_ == Mode::kTag) broken_tag(events);
  if (!strip_bracket()) irregular("a tag has no '<'");
  if (mode_ == Mode::kCall || mode_ == Mode::kValue) {
    const size_t begin = call_.raw.text.size();
    record(kDsml);
    if (recording_) call_.raw.special.push_back({begin, begin + kDsml.size()});
  }
  outer_ = mode_;
  mode_ = Mode::kTag;
  tag_.clear();
}

/// Reads more of a tag; returns the bytes taken.
size_t CompletionParser::take_tag(std::string_view text, Events& events) {
  for (size_t pos = 0; pos < text.size(); ++pos) {
    const char c = text[pos];
    const bool could_be = dsml::is_tag_start(tag_, c);
    if (!could_be || tag_.size() > kMaxTag) {
      // The marker alone: what stands behind it is text.
      lose(could_be ? "a tag does not end" : "the marker of tool calls stands in the text");
      mode_ = outer_;
      if (mode_ == Mode::kText && !after_markup_) flush_text(events);
      if (mode_ == Mode::kValue || mode_ == Mode::kCall)
        drop_call("a tool call is malformed", events);
      const std::string rest = std::exchange(tag_, {});
      if (could_be) return pos;
      take(rest, events);
      return pos;
    }
    const bool ends_without = dsml::ends_without_bracket(tag_, tag_closing_, c);
    if (!ends_without) tag_ += c;
    if (c != '>' && !ends_without) continue;
    dsml::Tag tag;
    if (!dsml::read_tag(tag_, tag_closing_, tag)) continue;
    if (ends_without) irregular("a tag has no '>'");
    mode_ = outer_;
    handle_tag(tag, events);
    return ends_without ? pos : pos + 1;
  }
  return text.size();
}

/// The tag was cut by another marker or the end; it counts if only its `>` is missing.
void CompletionParser::broken_tag(Events& events) {
  dsml::Tag tag;
  std::string text = std::exchange(tag_, {});
  pending_.clear();
  mode_ = outer_;
  for (const std::string_view end : {"</", "<"}) {
    if (!text.ends_with(end)) continue;
    text.resize(text.size() - end.size());
    pending_ = end;
    break;
  }
  const std::string bracket = std::exchange(pending_, {});
  if (!text.ends_with('>') && dsml::read_tag(text, tag_closing_, tag)) {
    irregular("a tag has no '>'");
    handle_tag(tag, events);
  } else {
    lose("a tag does not end");
    if (mode_ == Mode::kCall || mode_ == Mode::kValue)
      drop_call("a tool call is malformed", events);
    if (mode_ == Mode::kText) mode_ = Mode::kSkip;
  }
  pending_ = bracket;
}

void CompletionParser::handle_tag(const dsml::Tag& tag, Events& events) {
  if (!tag.regular) irregular("a tag is not as it should be");
  if (mode_ == Mode::kCall || mode_ == Mode::kValue) record(tag_);
  tag_.clear();
  const bool ends_value = mode_ == Mode::kValue && tag.closing && tag.name == "parameter";
  if (mode_ == Mode::kValue && !ends_value) drop_call("a parameter does not end", events);
  if (mode_ == Mode::kCall || mode_ == Mode::kText) {
    if (!is_gap(pending_, tag.closing)) irregular("unexpected text between tags");
    if (mode_ == Mode::kCall) {
      if (!is_blank(pending_)) lose("text stands between the parameters of a call");
      pending_.clear();
    }
  }
  if (tag.closing) {
    close_tag(tag, events);
  } else {
    open_tag(tag, events);
  }
}

/// Whether the encoder writes this between the tag before and one that begins now.
bool CompletionParser::is_gap(std::string_view gap, bool closing) const {
  switch (last_) {
    case Last::kText:
      return !reasoning_ && gap.ends_with("\n\n");
    case Last::kInvoke:
      return gap == "\n" || gap == "\n\n";
    case Last::kParameterEnd:
    case Last::kInvokeEnd:
    case Last::kBlock:
      return gap == "\n";
    case Last::kBlockEnd:
      break;
  }
  return closing && gap.empty();
}

/// Calls begin: the white space before them is not the text's, and they end the reasoning.
void CompletionParser::begin_markup(Events& events) {
  if (!after_markup_) {
    // All of it, but of a regular blank line only that.
    if (pending_.ends_with("\n\n")) {
      pending_.resize(pending_.size() - 2);
      if (!pending_.empty())
        emit(reasoning_ ? EventKind::kReasoning : EventKind::kContent, pending_, events);
    }
  }
  pending_.clear();
  if (reasoning_) irregular("the reasoning does not end with </think>");
  reasoning_ = false;
  after_markup_ = true;
}

void CompletionParser::open_tag(const dsml::Tag& tag, Events& events) {
  if (tag.name == "invoke") {
    if (mode_ == Mode::kCall) drop_call("a tool call does not end", events);
    if (!in_block_) irregular("a tool call stands outside a block");
    if (mode_ == Mode::kText) begin_markup(events);
    begin_call(tag, events);
  } else if (tag.name == "tool_calls" || tag.name == "function_calls") {
    if (mode_ == Mode::kCall) drop_call("a tool call does not end", events);
    if (in_block_ || had_block_ || tag.name != "tool_calls" || last_ != Last::kText)
      irregular("a block of tool calls is not as it should be");
    if (mode_ == Mode::kText) begin_markup(events);
    mode_ = Mode::kText;
    pending_.clear();
    in_block_ = had_block_ = after_markup_ = true;
    last_ = Last::kBlock;
  } else if (tag.name == "parameter" && mode_ == Mode::kCall) {
    begin_value(tag, events);
  } else {
    if (mode_ == Mode::kText) {
      begin_markup(events);
      in_block_ = in_block_ || tag.name == "parameter";
    }
    lose(tag.name == "parameter" ? "a parameter stands outside a tool call" : "a tag is unknown");
    if (mode_ == Mode::kCall) return drop_call("a tool call is malformed", events);
    if (tag.name == "parameter") mode_ = Mode::kSkip;
  }
}

void CompletionParser::close_tag(const dsml::Tag& tag, Events& events) {
  if (tag.name == "parameter" && mode_ == Mode::kValue) return end_value(events);
  if (tag.name == "invoke" && mode_ == Mode::kCall) return end_call(events);
  if (tag.name == "invoke" && mode_ == Mode::kSkip) {
    mode_ = Mode::kText;
    last_ = Last::kInvokeEnd;
  } else if (tag.name == "tool_calls" || tag.name == "function_calls") {
    if (mode_ == Mode::kCall) drop_call("a tool call does not end", events);
    if (!in_block_ || tag.name != "tool_calls")
      irregular("a block of tool calls is not as it should be");
    in_block_ = false;
    mode_ = Mode::kText;
    last_ = Last::kBlockEnd;
  } else if (mode_ == Mode::kCall) {
    irregular("a tag closes nothing");
    return;
  } else if (mode_ == Mode::kSkip) {
    pending_.clear();
    return;
  } else {
    irregular("a tag closes nothing");
    if (!after_markup_) flush_text(events);
  }
  pending_.clear();
  after_markup_ = true;
}

void CompletionParser::begin_call(const dsml::Tag& tag, Events& events) {
  pending_.clear();
  held_.clear();
  held_bytes_ = 0;
  begun_ = wrapper_ = false;
  wrapped_.clear();
  keys_.clear();
  call_ = {};
  mode_ = Mode::kCall;
  last_ = Last::kInvoke;
  if (!tag.key || tag.key->empty()) return drop_call("a tool call has no name", events);
  // Around a special token inside the tag, which is left out, text may add up to the marker.
  if (tag.key->find(kDsml) != std::string::npos)
    return drop_call("the name of a tool call holds a marker", events);
  call_.name = *tag.key;
  recording_ = true;
  call_.raw.text = concat(dsml::kInvoke, " name=\"", call_.name, "\">");
  call_.raw.special.push_back({1, 1 + kDsml.size()});
  CompletionEvent begin{EventKind::kCallBegin, {}, {}};
  begin.call.name = call_.name;
  held_.push_back(std::move(begin));
}

void CompletionParser::begin_value(const dsml::Tag& tag, Events& events) {
  if (!tag.key) return drop_call("a parameter has no name", events);
  if (std::find(keys_.begin(), keys_.end(), *tag.key) != keys_.end())
    return drop_call("a parameter is repeated", events);
  const bool known = tag.mark == "true" || tag.mark == "false";
  if (!known) irregular("a parameter does not say whether it is a string");
  if (wrapper_) {
    // It is one parameter among others.
    wrapper_ = false;
    emit_arguments(concat("{", quote_json(keys_.front()), ": ", wrapped_), events);
  }
  keys_.push_back(*tag.key);
  string_value_ = tag.mark != "false";
  wrapper_ = keys_.size() == 1 && options_.tools && options_.tools->may_wrap(call_.name, *tag.key);
  hold_value_ = wrapper_ || !string_value_ ||
                (options_.tools && !options_.tools->allows_string(call_.name, *tag.key));
  value_.clear();
  mode_ = Mode::kValue;
  if (wrapper_) return;
  emit_arguments(
      concat(keys_.size() == 1 ? "{" : ", ", quote_json(*tag.key), ": ", hold_value_ ? "" : "\""),
      events);
}

void CompletionParser::end_value(Events& events) {
  pending_.clear();
  mode_ = Mode::kCall;
  last_ = Last::kParameterEnd;
  static const ToolSchemas nothing_known;
  const ToolSchemas& tools = options_.tools ? *options_.tools : nothing_known;
  if (!hold_value_) return emit_arguments("\"", events);
  std::string json = tools.value(call_.name, keys_.back(), value_, string_value_);
  if (!wrapper_) return emit_arguments(json, events);
  wrapped_ = std::move(json);
}

void CompletionParser::end_call(Events& events) {
  mode_ = Mode::kText;
  last_ = Last::kInvokeEnd;
  after_markup_ = true;
  if (wrapper_) {
    const std::string object = options_.tools->unwrap(call_.name, value_);
    emit_arguments(
        object.empty() ? concat("{", quote_json(keys_.front()), ": ", wrapped_, "}") : object,
        events);
  } else {
    emit_arguments(keys_.empty() ? "{}" : "}", events);
  }
  release(events);
  // The markup is the event's alone: it is long, and the result's readers do not need it.
  CompletionEvent end{EventKind::kToolCall, {}, {}};
  end.call.raw = std::exchange(call_.raw, {});
  end.call.name = call_.name;
  end.call.arguments = call_.arguments;
  events.push_back(std::move(end));
  result_.tool_calls.push_back(std::exchange(call_, {}));
}

/// The call under way is left out; what follows of it is skipped.
void CompletionParser::drop_call(std::string_view why, Events& events) {
  lose(why);
  if (begun_) events.push_back({EventKind::kCallDropped, {}, {}});
  begun_ = false;
  held_.clear();
  mode_ = Mode::kSkip;
  pending_.clear();
}

/// Keeps the call's markup as it was written, unless it is very long.
void CompletionParser::record(std::string_view text) {
  if (!recording_) return;
  recording_ = call_.raw.text.size() + text.size() <= kMaxRaw;
  if (recording_) {
    call_.raw.text += text;
  } else {
    call_.raw = {};
  }
}

void CompletionParser::release(Events& events) {
  for (CompletionEvent& event : held_) events.push_back(std::move(event));
  held_.clear();
  begun_ = true;
}

void CompletionParser::emit(CompletionEvent::Kind kind, std::string_view text, Events& events) {
  (kind == EventKind::kReasoning ? result_.reasoning : result_.content) += text;
  if (!events.empty() && events.back().kind == kind) {
    events.back().text += text;
  } else {
    events.push_back({kind, std::string(text), {}});
  }
}

void CompletionParser::emit_arguments(std::string text, Events& events) {
  if (text.empty()) return;
  call_.arguments += text;
  if (!begun_ && call_.arguments.size() > options_.hold_bytes) release(events);
  Events& target = begun_ ? events : held_;
  if (!target.empty() && target.back().kind == EventKind::kArguments) {
    target.back().text += text;
  } else {
    target.push_back({EventKind::kArguments, std::move(text), {}});
  }
}

void CompletionParser::flush_text(Events& events) {
  const bool blank = after_markup_ && is_blank(pending_);
  if (!pending_.empty() && !blank)
    emit(reasoning_ ? EventKind::kReasoning : EventKind::kContent, pending_, events);
  if (!pending_.empty() && after_markup_) irregular("text follows the tool calls");
  pending_.clear();
}

void CompletionParser::end_of_sentence(Events& events) {
  if (mode_ == Mode::kDone) return lose("text follows the end-of-sentence token");
  end_completion(events);
  if (mode_ == Mode::kCall || mode_ == Mode::kValue) drop_call("a tool call does not end", events);
  if (reasoning_) {
    result_.open_reasoning = true;
    lose("the reasoning does not end with </think>");
  }
  if (in_block_) irregular("the tool call block does not end");
  mode_ = Mode::kDone;
}

/// Nothing more comes to what is held back.
void CompletionParser::end_completion(Events& events) {
  if (mode_ == Mode::kTag) {
    broken_tag(events);
    pending_.clear();
  }
  if (mode_ == Mode::kText) flush_text(events);
}

Completion CompletionParser::finish(std::vector<CompletionEvent>& events) {
  take(utf8_.flush(), events);
  if (mode_ == Mode::kDone) {
    result_.ok = result_.error.empty();
    return std::move(result_);
  }
  end_completion(events);
  result_.cut = mode_ != Mode::kText || result_.tool_calls.empty();
  if (mode_ == Mode::kCall || mode_ == Mode::kValue) {
    // What there is of the call, for those who asked for no more.
    if (!begun_) release(events);
    irregular("a tool call does not end");
  } else if (reasoning_) {
    irregular("the reasoning does not end with </think>");
  } else if (in_block_) {
    irregular("the tool call block does not end");
  } else if (last_ != Last::kBlockEnd) {
    irregular("the completion does not end with the end-of-sentence token");
  }
  result_.ok = result_.error.empty();
  return std::move(result_);
}

void CompletionParser::irregular(std::string_view why) {
  if (result_.error.empty()) result_.error = why;
}

void CompletionParser::lose(std::string_view why) {
  if (!result_.lost) result_.error = why;  // more important than what is only unusual
  result_.lost = true;
}

}  // namespace hadal::text
