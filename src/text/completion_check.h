// What tests and fuzz targets of CompletionParser share: for any cutting, the result of the whole.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/completion_parser.h"
#include "text/tool_calls.h"
#include "text/utf8.h"

namespace hadal::text {

/// Bytes that never occur in UTF-8 stand for pieces of markup, so that the fuzzer reaches the
/// grammar quickly.
inline std::string expand_markup(std::string_view data) {
  static const std::string pieces[] = {std::string(tool_block_start()),
                                       std::string(dsml::kInvoke),
                                       std::string(dsml::kInvokeEnd),
                                       std::string(dsml::kParameter),
                                       "<" + std::string(dsml::kParameterEnd),
                                       std::string(dsml::kBlockEnd),
                                       " name=\"a\"",
                                       " string=\"true\"",
                                       std::string(dsml::kTagEnd),
                                       std::string(kEos),
                                       std::string(kThinkEnd)};
  std::string text;
  for (const char c : data) {
    const auto byte = static_cast<uint8_t>(c);
    if (byte >= 0xF5) {
      text += pieces[byte - 0xF5];
    } else {
      text += c;
    }
  }
  return text;
}

/// What the events of a completion add up to.
struct EventSums {
  std::string error;  ///< an event that must not be; empty if all may
  std::string reasoning, content;
  std::vector<ToolCall> calls;
  ToolCall open;  ///< of a call that does not end
  bool is_open = false;

  void add(const CompletionEvent& event) {
    using Kind = CompletionEvent::Kind;
    if (valid_utf8_prefix(event.text) != event.text.size()) error = "an event cuts a character";
    switch (event.kind) {
      case Kind::kReasoning:
      case Kind::kContent:
        if (event.text.empty() || is_open) error = "a text event is empty or inside a call";
        (event.kind == Kind::kReasoning ? reasoning : content) += event.text;
        break;
      case Kind::kCallBegin:
        if (is_open) error = "a call inside a call";
        open = {event.call.name, ""};
        is_open = true;
        break;
      case Kind::kArguments:
        if (!is_open) error = "arguments outside a call";
        if (event.text.empty()) error = "empty arguments";
        open.arguments += event.text;
        break;
      case Kind::kToolCall:
        if (!is_open || open != event.call) error = "a call differs from its pieces";
        if (!is_json(open.arguments)) error = "arguments are no JSON";
        is_open = false;
        calls.push_back(event.call);
        break;
      case Kind::kCallDropped:
        if (!is_open) error = "a call is dropped that is not open";
        is_open = false;
        break;
    }
  }
};

/// Pushes text in which literals stand for special tokens, the ordinary text cut at the given
/// ascending positions.
template <class Take>
void push_cut(CompletionParser& parser,
              std::string_view text,
              const std::vector<size_t>& cuts,
              const Take& take) {
  size_t done = 0, next_cut = 0;
  while (done < text.size()) {
    const auto [offset, size] = find_special(text.substr(done));
    const size_t end = done + offset;
    for (; next_cut < cuts.size() && cuts[next_cut] < end; ++next_cut) {
      if (cuts[next_cut] <= done) continue;
      take(parser.push(text.substr(done, cuts[next_cut] - done)));
      done = cuts[next_cut];
    }
    take(parser.push(text.substr(done, end - done)));
    if (size > 0) take(parser.push_special(text.substr(end, size)));
    done = end + size;
  }
}

/// Feeds `bytes` cut at the given ascending positions; returns "" or what is wrong. `whole` is what
/// parse_completion() says of them.
inline std::string check_cutting(std::string_view bytes,
                                 ThinkingMode mode,
                                 const std::vector<size_t>& cuts,
                                 const Completion& whole) {
  CompletionParser parser(mode);
  EventSums sums;
  const auto take = [&](const std::vector<CompletionEvent>& events) {
    for (const CompletionEvent& event : events) sums.add(event);
  };
  push_cut(parser, bytes, cuts, take);
  std::vector<CompletionEvent> rest;
  const Completion found = parser.finish(rest);
  take(rest);
  if (!sums.error.empty()) return sums.error;
  const auto& [error, reasoning, content, calls, open, is_open] = sums;
  if (found.ok && is_open) return "a call does not end";
  if (reasoning != found.reasoning || content != found.content || calls != found.tool_calls)
    return "the events differ from the result";
  // Around something that is left out, pieces of text may add up to anything.
  for (const std::string_view forbidden : forbidden_in_text()) {
    if (!found.ok) break;
    if (reasoning.find(forbidden) != std::string::npos ||
        content.find(forbidden) != std::string::npos) {
      return concat("'", forbidden, "' leaks");
    }
  }
  if (found.ok != found.error.empty()) return "malformed without a reason, or well-formed with one";
  if (found.ok && found.lost) return "well-formed, but something is lost";
  if (found.ok != whole.ok || found.error != whole.error || found.lost != whole.lost ||
      found.open_reasoning != whole.open_reasoning)
    return concat("whole: ", whole.error, "; pieces: ", found.error);
  if (found.reasoning != whole.reasoning || found.content != whole.content ||
      found.tool_calls != whole.tool_calls)
    return "the result differs from the whole's";
  return "";
}

inline std::string check_cutting(std::string_view bytes,
                                 ThinkingMode mode,
                                 const std::vector<size_t>& cuts) {
  return check_cutting(bytes, mode, cuts, parse_completion(bytes, mode));
}

}  // namespace hadal::text
