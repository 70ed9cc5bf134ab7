#include "load/answer.h"

#include <nlohmann/json.hpp>

namespace hadal::load {
namespace {

using Json = nlohmann::json;

/// The member of that name, or null. Load tests meet every kind of server: what is absent, null or
/// of another type is taken as not said.
const Json& member(const Json& object, const char* key) {
  static const Json null;
  if (!object.is_object()) return null;
  const auto found = object.find(key);
  return found == object.end() ? null : *found;
}

/// Appends the string of that name; false when there is none or it is empty.
bool append(std::string& to, const Json& object, const char* key) {
  const Json& value = member(object, key);
  if (!value.is_string() || value.get_ref<const std::string&>().empty()) return false;
  to += value.get_ref<const std::string&>();
  return true;
}

void count(int64_t& to, const Json& object, const char* key) {
  const Json& value = member(object, key);
  if (value.is_number_integer()) to = value.get<int64_t>();
}

ApiError api_error(const Json& json) {
  const Json& error = member(json, "error");
  ApiError result;
  if (error.is_string()) result.message = error.get<std::string>();
  if (!append(result.type, error, "type")) append(result.type, error, "code");
  append(result.message, error, "message");
  return result;
}

/// Names and arguments in the order they came; ids are random and left out.
bool append_tool_calls(std::string& to, const Json& calls) {
  if (!calls.is_array()) return false;
  bool any = false;
  for (const Json& call : calls) {
    const Json& function = member(call, "function");
    std::string name;
    if (append(name, function, "name")) {
      to += (to.empty() ? "" : "\n") + name + ' ';
      any = true;
    }
    any |= append(to, function, "arguments");
  }
  return any;
}

bool append_choice(AnswerText& answer, const Json& choice) {
  const Json& delta = member(choice, "delta");
  bool any = append(answer.reasoning, delta, "reasoning_content") ||
             append(answer.reasoning, delta, "reasoning");
  any |= append(answer.text, delta, "content");
  any |= append(answer.text, choice, "text");
  any |= append_tool_calls(answer.tool_calls, member(delta, "tool_calls"));
  append(answer.finish_reason, choice, "finish_reason");
  return any;
}

}  // namespace

bool AnswerReader::event(std::string_view data, double now) {
  if (done_) return true;
  if (data == "[DONE]") {
    done_ = true;
    return true;
  }
  const Json json = Json::parse(data, nullptr, false);
  if (!json.is_object()) {
    outcome_.error = "bad stream";
    outcome_.detail = "no JSON object: " + std::string(data.substr(0, 80));
    return false;
  }
  if (const Json& error = member(json, "error"); !error.is_null()) {
    const ApiError parsed = api_error(json);
    outcome_.error = parsed.type.empty() ? "API error" : "API " + parsed.type;
    outcome_.detail = parsed.message;
    return false;
  }
  const Json& choices = member(json, "choices");
  if (choices.is_array() && !choices.empty() && append_choice(outcome_.answer, choices[0])) {
    if (outcome_.first < 0)
      outcome_.first = now;
    else
      outcome_.gaps.push_back(now - outcome_.last);
    outcome_.last = now;
    ++outcome_.pieces;
  }
  const Json& usage = member(json, "usage");
  count(outcome_.answer_tokens, usage, "completion_tokens");
  count(outcome_.prompt_tokens, usage, "prompt_tokens");
  count(outcome_.cached_tokens, member(usage, "prompt_tokens_details"), "cached_tokens");
  return true;
}

ApiError parse_api_error(std::string_view body) {
  return api_error(Json::parse(body, nullptr, false));
}

}  // namespace hadal::load
