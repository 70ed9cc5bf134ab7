#include "testing/answer_fixture.h"

#include <algorithm>
#include <functional>
#include <regex>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "text/python_json.h"

namespace hadal::testing {
namespace {

using nlohmann::json;

std::string text_of(const json& object, const char* key) {
  const auto found = object.find(key);
  return found != object.end() && found->is_string() ? found->get<std::string>() : "";
}

void read_chat(const json& choice, const char* part, SeenAnswer& seen) {
  const json& message = choice.at(part);
  seen.reasoning += text_of(message, "reasoning_content");
  seen.content += text_of(message, "content");
  seen.finish += text_of(choice, "finish_reason");
  seen.malformed += text_of(choice, "malformed");
  for (const json& call : message.value("tool_calls", json::array())) {
    const size_t index = call.value("index", seen.calls.size());
    seen.calls.resize(std::max(seen.calls.size(), index + 1));
    seen.calls[index].first += text_of(call.at("function"), "name");
    seen.calls[index].second += text_of(call.at("function"), "arguments");
  }
}

void read_response(const json& response, SeenAnswer& seen) {
  seen.finish = text_of(response, "status");
  if (response.at("incomplete_details").is_object())
    seen.malformed = text_of(response["incomplete_details"], "reason");
  for (const json& item : response.at("output")) {
    if (item["type"] == "function_call") {
      seen.calls.emplace_back(item["name"], item["arguments"]);
    } else {
      (item["type"] == "message" ? seen.content : seen.reasoning) += item["content"][0]["text"];
    }
  }
}

void read_message(const json& message, SeenAnswer& seen) {
  seen.finish = text_of(message, "stop_reason");
  seen.malformed = text_of(message, "malformed");
  for (const json& block : message.at("content")) {
    if (block["type"] == "tool_use") {
      seen.calls.emplace_back(block["name"],
                              text::PyJson::parse(block["input"].dump(), "input").dump());
    } else {
      seen.content += text_of(block, "text");
      seen.reasoning += text_of(block, "thinking");
    }
  }
}

void read_message_event(const json& event, SeenAnswer& seen) {
  if (event["type"] == "content_block_start" && event["content_block"]["type"] == "tool_use")
    seen.calls.emplace_back(event["content_block"]["name"], "");
  const json delta = event.value("delta", json::object());
  seen.content += text_of(delta, "text");
  seen.reasoning += text_of(delta, "thinking");
  if (delta.contains("partial_json")) seen.calls.back().second += delta["partial_json"];
  seen.finish += text_of(delta, "stop_reason");
  seen.malformed += text_of(delta, "malformed");
}

}  // namespace

SeenAnswer AnswerTest::ask(Route route, bool thinks, bool streams, std::string more) {
  std::string tools = functions_;
  const auto replace = [](std::string text, const std::string& from, const std::string& to) {
    return std::regex_replace(text, std::regex(from), to);
  };
  std::string body, path;
  if (!more.empty()) more = ", " + more;
  if (streams) more += R"(, "stream": true)";
  switch (route) {
    case Route::kChat:
      path = "/v1/chat/completions";
      tools = replace(replace(tools, "PARAMETERS", "parameters"), "\\{\"name\"",
                      R"({"type": "function", "function": {"name")");
      tools = replace(tools, "\\}(, \\{\"type\": \"function\"|$)", "}}$1");
      body = concat(R"({"messages": [{"role": "user", "content": "x"}], "thinking": )",
                    thinks ? "true" : "false", R"(, "tools": [)", tools, "]", more, "}");
      break;
    case Route::kResponses:
      path = "/v1/responses";
      tools = replace(replace(tools, "PARAMETERS", "parameters"), "\\{\"name\"",
                      R"({"type": "function", "name")");
      body = concat(R"({"input": "x", "reasoning": {"effort": ")", thinks ? "high" : "none",
                    R"("}, "tools": [)", tools, "]", more, "}");
      break;
    case Route::kMessages:
      path = "/v1/messages";
      tools = replace(tools, "PARAMETERS", "input_schema");
      body = concat(
          R"({"max_tokens": 30000, "messages": [{"role": "user", "content": "x"}], "thinking": )",
          thinks ? R"({"type": "enabled", "budget_tokens": 20000})" : R"({"type": "disabled"})",
          R"(, "tools": [)", tools, "]", more, "}");
      break;
  }
  const server::HttpResponse reply = post(path, body);
  SeenAnswer seen;
  seen.status = reply.status;
  seen.raw = reply.body;
  if (reply.status != 200) return seen;
  if (!streams) {
    const json whole = json::parse(reply.body);
    if (route == Route::kChat) read_chat(whole["choices"][0], "message", seen);
    if (route == Route::kResponses) read_response(whole, seen);
    if (route == Route::kMessages) read_message(whole, seen);
    return seen;
  }
  server::SseParser parser;
  SeenAnswer last;  // of /v1/responses: what its last event says
  parser.feed(reply.body, [&](const server::SseEvent& event) {
    if (event.data == "[DONE]") return;
    const json data = json::parse(event.data);
    if (route == Route::kChat) {
      if (!data["choices"].empty()) read_chat(data["choices"][0], "delta", seen);
    } else if (route == Route::kMessages) {
      read_message_event(data, seen);
    } else {
      const std::string type = data["type"];
      if (type == "response.reasoning_text.delta") seen.reasoning += data["delta"];
      if (type == "response.output_text.delta") seen.content += data["delta"];
      if (type == "response.output_item.added" && data["item"]["type"] == "function_call")
        seen.calls.emplace_back(data["item"]["name"], "");
      if (type == "response.function_call_arguments.delta")
        seen.calls.back().second += data["delta"];
      if (type == "response.completed" || type == "response.incomplete")
        read_response(data["response"], last);
    }
  });
  if (route == Route::kResponses) {
    EXPECT_EQ(last.content, seen.content);
    EXPECT_EQ(last.reasoning, seen.reasoning);
    EXPECT_EQ(last.calls, seen.calls);
    seen.finish = last.finish;
    seen.malformed = last.malformed;
  }
  return seen;
}

SeenAnswer AnswerTest::ask_both(Route route, bool thinks, const std::string& more) {
  SeenAnswer whole = ask(route, thinks, false, more);
  const SeenAnswer streamed = ask(route, thinks, true, more);
  EXPECT_EQ(whole.status, streamed.status);
  EXPECT_EQ(whole.content, streamed.content) << script_;
  EXPECT_EQ(whole.reasoning, streamed.reasoning) << script_;
  EXPECT_EQ(whole.calls, streamed.calls) << script_;
  EXPECT_EQ(whole.finish, streamed.finish) << script_;
  EXPECT_EQ(whole.malformed, streamed.malformed) << script_;
  return whole;
}

}  // namespace hadal::testing
