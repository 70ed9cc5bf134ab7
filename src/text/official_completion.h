// The official reading of a completion, to compare with: whole and well-formed ones only
// (chat_encoding.md 5). For tests.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"
#include "text/utf8.h"

namespace hadal::text::official {

inline constexpr std::string_view kName = "name=\"";
inline constexpr std::string_view kAsString = "\" string=\"true\">";
inline constexpr std::string_view kAsJson = "\" string=\"false\">";

/// Python's str.isspace for one character, which `\s` of its expressions is.
inline bool is_space(char32_t code) {
  return (code >= 0x9 && code <= 0xD) || (code >= 0x1C && code <= 0x20) || code == 0x85 ||
         code == 0xA0 || code == 0x1680 || (code >= 0x2000 && code <= 0x200A) || code == 0x2028 ||
         code == 0x2029 || code == 0x202F || code == 0x205F || code == 0x3000;
}

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

inline bool strip_end(std::string_view& text, std::string_view end) {
  if (text.ends_with(end)) {
    text.remove_suffix(end.size());
    return true;
  }
  if (!text.ends_with('\n')) return false;
  text.remove_suffix(1);
  if (!text.ends_with(end)) return false;
  text.remove_suffix(end.size());
  return true;
}

// ^\s*name="(.*?)">\n$
inline bool read_head(std::string_view head, std::string& name) {
  size_t pos = 0;
  while (pos < head.size()) {
    const Utf8Char c = decode_utf8(head, pos);
    if (!is_space(c.code_point)) break;
    pos += c.length;
  }
  head.remove_prefix(pos);
  if (!head.starts_with(kName)) return false;
  head.remove_prefix(kName.size());
  if (!strip_end(head, "\">\n")) return false;
  name = head;
  return true;
}

inline bool CallBuilder::open(std::string_view head) {
  parameters_.clear();
  return read_head(head, name_);
}

// ^ name="(.*?)" string="(true|false)">(.*?)<$
inline bool CallBuilder::add(std::string_view parameter) {
  if (!parameter.starts_with(' ') || !parameter.substr(1).starts_with(kName)) return false;
  parameter.remove_prefix(1 + kName.size());
  const size_t as_string = parameter.find(kAsString);
  const size_t as_json = parameter.find(kAsJson);
  const size_t key_end = std::min(as_string, as_json);
  if (key_end == std::string_view::npos) return false;
  const bool is_string = as_string < as_json;
  std::string_view value = parameter.substr(key_end + (is_string ? kAsString : kAsJson).size());
  if (!strip_end(value, "<")) return false;
  const std::string_view key = parameter.substr(0, key_end);
  const bool known = std::any_of(parameters_.begin(), parameters_.end(),
                                 [&](const Parameter& p) { return p.key == key; });
  if (known) return false;
  parameters_.push_back({std::string(key), is_string ? quote_json(value) : std::string(value)});
  return true;
}

inline ToolCall CallBuilder::close() {
  ToolCall call;
  call.name = std::move(name_);
  call.arguments = "{";
  const char* separator = "";
  for (const Parameter& parameter : parameters_) {
    call.arguments += concat(separator, quote_json(parameter.key), ": ", parameter.value);
    separator = ", ";
  }
  call.arguments += "}";
  return call;
}

/// The text up to the earliest of several stop strings.
struct Stretch {
  std::string_view text;
  std::string_view stop;  ///< empty: none of them comes
};

inline Stretch read_until(std::string_view& rest, std::initializer_list<std::string_view> stops) {
  Stretch found{rest, {}};
  for (const std::string_view stop : stops) {
    const size_t pos = rest.find(stop);
    if (pos < found.text.size()) found = {rest.substr(0, pos), stop};
  }
  rest.remove_prefix(found.text.size() + found.stop.size());
  return found;
}

inline Completion malformed(Completion completion, std::string error) {
  completion.ok = false;
  completion.error = std::move(error);
  return completion;
}

/// Reads the calls behind tool_block_start(); returns an error or "".
inline std::string parse_calls(std::string_view& rest, std::vector<ToolCall>& calls) {
  for (;;) {
    const Stretch before = read_until(rest, {dsml::kInvoke, dsml::kBlockEnd});
    if (before.stop.empty()) return "the tool call block does not end";
    if (before.text != dsml::kTagEnd) return "unexpected text between tool calls";
    if (before.stop == dsml::kBlockEnd) return "";
    CallBuilder call;
    Stretch part = read_until(rest, {dsml::kParameter, dsml::kInvokeEnd});
    if (part.stop.empty()) return "a tool call does not end";
    if (!call.open(part.text)) return "a tool call has no name";
    while (part.stop == dsml::kParameter) {
      const Stretch parameter = read_until(rest, {dsml::kParameterEnd});
      if (parameter.stop.empty()) return "a parameter does not end";
      if (!call.add(parameter.text)) return "a parameter is malformed or repeated";
      part = read_until(rest, {dsml::kParameter, dsml::kInvokeEnd});
      if (part.stop.empty()) return "a tool call does not end";
      if (part.text != dsml::kTagEnd) return "unexpected text between parameters";
    }
    calls.push_back(call.close());
  }
}

inline Completion read_completion(std::string_view text, ThinkingMode mode) {
  const std::string repaired = repair_utf8(text);
  std::string_view rest = repaired;
  Completion result;
  if (mode == ThinkingMode::kThinking) {
    const Stretch reasoning = read_until(rest, {kThinkEnd, tool_block_start()});
    if (reasoning.stop != kThinkEnd)
      return malformed(result, "the reasoning does not end with </think>");
    result.reasoning = reasoning.text;
  }
  const Stretch content = read_until(rest, {kEos, tool_block_start()});
  if (content.stop.empty())
    return malformed(result, "the completion does not end with the end-of-sentence token");
  result.content = content.text;
  for (const std::string_view forbidden : forbidden_in_text()) {
    if (result.content.find(forbidden) != std::string::npos ||
        result.reasoning.find(forbidden) != std::string::npos) {
      return malformed(result, concat("'", forbidden, "' stands in the text"));
    }
  }
  if (content.stop == tool_block_start()) {
    if (const std::string error = parse_calls(rest, result.tool_calls); !error.empty()) {
      return malformed(result, error);
    }
    if (rest.starts_with(kEos)) {
      rest.remove_prefix(kEos.size());
    } else if (!rest.empty()) {
      return malformed(result, "text follows the tool calls");
    }
  }
  if (!rest.empty()) return malformed(result, "text follows the end-of-sentence token");
  result.ok = true;
  return result;
}

}  // namespace hadal::text::official
