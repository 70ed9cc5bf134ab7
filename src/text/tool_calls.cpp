#include "text/tool_calls.h"

#include <algorithm>
#include <array>
#include <optional>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/completion_parser.h"

namespace hadal::text {
namespace dsml {

const std::string_view kBlockEnd = "</\uff5cDSML\uff5ctool_calls>";
const std::string_view kInvoke = "<\uff5cDSML\uff5cinvoke";
const std::string_view kInvokeEnd = "</\uff5cDSML\uff5cinvoke";
const std::string_view kParameter = "<\uff5cDSML\uff5cparameter";
const std::string_view kParameterEnd = "/\uff5cDSML\uff5cparameter";
const std::string_view kTagEnd = ">\n";

}  // namespace dsml

namespace {

/// The arguments as an object of Python values; nothing if they are none.
std::optional<PyJson> parse_arguments(const std::string& arguments) {
  try {
    PyJson value = PyJson::parse(arguments, "arguments");
    if (value.is_object()) return value;
  } catch (const InputError&) {
    return std::nullopt;
  }
  return std::nullopt;
}

/// Special tokens that the parser of completions knows.
constexpr std::array<std::string_view, 5> kSpecial = {kBos, kEos, kThinkStart, kThinkEnd, kDsml};

void write_parameters(const std::string& arguments, ChatPrompt& prompt) {
  std::optional<PyJson> object = parse_arguments(arguments);
  if (!object) object = PyJson::object({{"arguments", PyJson::string(arguments)}});
  const char* separator = "";
  for (const auto& [key, value] : object->members()) {
    prompt.text += concat(separator, dsml::kParameter, " name=\"");
    prompt.add_foreign(key);
    prompt.text += concat("\" string=\"", value.is_string() ? "true" : "false", "\">");
    prompt.add_foreign(value.is_string() ? value.text() : value.dump());
    prompt.text += concat("<", dsml::kParameterEnd, ">");
    separator = "\n";
  }
}

void write_raw(const RawMarkup& raw, ChatPrompt& prompt) {
  const std::string_view text = raw.text;
  size_t done = 0;
  for (const TextRange& special : raw.special) {
    prompt.add_foreign(text.substr(done, special.begin - done));
    prompt.text += text.substr(special.begin, special.end - special.begin);
    done = special.end;
  }
  prompt.add_foreign(text.substr(done));
}

}  // namespace

std::span<const std::string_view> forbidden_in_text() { return kSpecial; }

std::string_view tool_block_start() { return "\n\n<\uff5cDSML\uff5ctool_calls"; }

std::string write_tool_calls(std::span<const ToolCall> calls) {
  ChatPrompt prompt;
  write_tool_calls(calls, prompt);
  return std::move(prompt.text);
}

void write_tool_calls(std::span<const ToolCall> calls, ChatPrompt& prompt) {
  std::string& out = prompt.text;
  out += concat("<", kDsml, "tool_calls>\n");
  for (const ToolCall& call : calls) {
    if (!call.raw.text.empty()) {
      write_raw(call.raw, prompt);
      out += "\n";
      continue;
    }
    out += concat(dsml::kInvoke, " name=\"");
    prompt.add_foreign(call.name);
    out += "\">\n";
    write_parameters(call.arguments, prompt);
    out += concat("\n", dsml::kInvokeEnd, ">\n");
  }
  if (calls.empty()) out += "\n";
  out += dsml::kBlockEnd;
}

PyJson Completion::to_json() const {
  PyJson calls = PyJson::array();
  for (const ToolCall& call : tool_calls) {
    PyJson function = PyJson::object(
        {{"name", PyJson::string(call.name)}, {"arguments", PyJson::string(call.arguments)}});
    calls.items().push_back(
        PyJson::object({{"type", PyJson::string("function")}, {"function", std::move(function)}}));
  }
  return PyJson::object({{"role", PyJson::string("assistant")},
                         {"content", PyJson::string(content)},
                         {"reasoning_content", PyJson::string(reasoning)},
                         {"tool_calls", std::move(calls)}});
}

std::pair<size_t, size_t> find_special(std::string_view text) {
  // First bytes of all of them: '<' and the lead byte of U+FF5C.
  for (size_t pos = 0; (pos = text.find_first_of("<\xEF", pos)) != std::string_view::npos; ++pos) {
    for (const std::string_view special : kSpecial) {
      if (text.substr(pos).starts_with(special)) return {pos, special.size()};
    }
  }
  return {text.size(), 0};
}

Completion parse_completion(std::string_view text, ThinkingMode mode) {
  CompletionParser parser(mode);
  while (!text.empty()) {
    const auto [pos, size] = find_special(text);
    parser.push(text.substr(0, pos));
    if (size > 0) parser.push_special(text.substr(pos, size));
    text.remove_prefix(pos + size);
  }
  std::vector<CompletionEvent> events;
  return parser.finish(events);
}

}  // namespace hadal::text
