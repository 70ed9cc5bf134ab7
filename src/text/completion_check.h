// The property of CompletionParser that its test and its fuzz target share: for any cutting, the
// result of the whole.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "text/completion_parser.h"
#include "text/tool_calls.h"
#include "text/utf8.h"

namespace hadal::text {

/// Feeds `bytes` cut at the given ascending positions; returns "" or what is wrong.
inline std::string check_cutting(std::string_view bytes,
                                 ThinkingMode mode,
                                 const std::vector<size_t>& cuts) {
  const Completion whole = parse_completion(bytes, mode);
  CompletionParser parser(mode);
  std::vector<CompletionEvent> events;
  const auto push = [&](std::string_view piece) {
    for (CompletionEvent& event : parser.push(piece)) events.push_back(std::move(event));
  };
  size_t done = 0;
  for (const size_t cut : cuts) {
    push(bytes.substr(done, cut - done));
    done = cut;
  }
  push(bytes.substr(done));
  const Completion found = parser.finish(events);

  std::string reasoning;
  std::string content;
  std::vector<ToolCall> calls;
  for (const CompletionEvent& event : events) {
    if (event.kind == CompletionEvent::Kind::kToolCall) {
      calls.push_back(event.call);
      continue;
    }
    if (event.text.empty()) return "an empty text event";
    if (valid_utf8_prefix(event.text) != event.text.size()) return "a text event cuts a character";
    (event.kind == CompletionEvent::Kind::kReasoning ? reasoning : content) += event.text;
  }
  if (reasoning != found.reasoning || content != found.content || calls != found.tool_calls) {
    return "the events differ from the result";
  }
  for (const std::string_view forbidden : forbidden_in_text()) {
    if (reasoning.find(forbidden) != std::string::npos ||
        content.find(forbidden) != std::string::npos) {
      return concat("'", forbidden, "' leaks");
    }
  }
  const std::string repaired = repair_utf8(bytes);
  if (!repaired.starts_with(mode == ThinkingMode::kThinking ? reasoning : content))
    return "text was invented";
  if (found.ok != whole.ok)
    return concat("whole: ", whole.ok ? "well-formed" : whole.error,
                  "; pieces: ", found.ok ? "well-formed" : found.error);
  if (!found.ok && found.error.empty()) return "malformed without a reason";
  if (found.ok && (found.reasoning != whole.reasoning || found.content != whole.content ||
                   found.tool_calls != whole.tool_calls)) {
    return "the result differs from the whole's";
  }
  return "";
}

}  // namespace hadal::text
