// Coding agents' own requests, replayed: the first ones that they send, and sessions of ten turns
// in which the client sends back what it was given, as it does.
//
// tests/clients/recorded holds the requests in the shapes that the agents' documentation and public
// logs show (contents are ours), and for each turn what the model writes and what the client adds
// to it: "$0" stands for the id of the answer's first call. What every turn must keep: 200, a
// stream that the client's package would accept, counts that agree, and a prompt that begins with
// the whole prompt before it and the tokens of its answer, so that nothing is computed twice.
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "testing/scripted_service.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace hadal::server {
namespace {

using json = nlohmann::ordered_json;  // clients keep the order of keys
using testing::Reply;
using testing::ScriptedService;

json recorded(const std::string& name) {
  std::ifstream file(std::string(HADAL_RECORDED) + "/" + name);
  EXPECT_TRUE(file.good()) << name;
  return json::parse(file);
}

std::string header_lines(const json& headers) {
  std::string lines;
  for (const auto& [name, value] : headers.items())
    lines += name + ": " + value.get<std::string>() + "\r\n";
  return lines;
}

/// What the model writes in a turn.
std::string written(const json& answer, bool thinks) {
  std::string text;
  if (thinks) text = answer.at("thinking").get<std::string>() + std::string(text::kThinkEnd);
  text += answer.at("text").get<std::string>();
  std::vector<text::ToolCall> calls;
  for (const json& call : answer.at("calls")) {
    const json arguments =
        call.contains("custom") ? json{{"input", call.at("custom")}} : call.at("arguments");
    calls.push_back({call.at("name").get<std::string>(), arguments.dump()});
  }
  if (!calls.empty()) text += "\n\n" + text::write_tool_calls(calls);
  return text;
}

/// "$2" everywhere becomes the third id.
void put_ids(json& value, const std::vector<std::string>& ids) {
  if (value.is_string()) {
    const std::string& text = value.get_ref<const std::string&>();
    if (text.size() == 2 && text[0] == '$') value = ids.at(static_cast<size_t>(text[1] - '0'));
  } else if (value.is_structured()) {
    for (json& item : value) put_ids(item, ids);
  }
}

std::vector<std::pair<std::string, json>> sse_of(const Reply& reply) {
  std::vector<std::pair<std::string, json>> events;
  for (const testing::ServerEvent& event : testing::events_of(reply))
    events.emplace_back(event.name, json::parse(event.data.dump()));
  return events;
}

/// Holds each turn's prompt to the one before and what was written behind it.
class Prefixes {
 public:
  explicit Prefixes(const ScriptedService& service) : service_(service) {}
  void check(const std::string& where) {
    const std::vector<int64_t> now = service_.prompt_tokens();
    const auto common = std::ranges::mismatch(expected_, now).in1 - expected_.begin();
    EXPECT_EQ(common, std::ssize(expected_)) << where << ": the prompt leaves what was known at\n"
                                             << text_of(expected_, common) << "\nfor\n"
                                             << text_of(now, common);
    expected_ = now;
    for (const int32_t id : service_.tokenizer.encode(service_.answer + std::string(text::kEos),
                                                      text::SpecialTokens::kRecognise))
      expected_.push_back(id);
  }

 private:
  std::string text_of(const std::vector<int64_t>& tokens, int64_t from) const {
    const auto begin =
        tokens.begin() + std::max<int64_t>(0, std::min(from, std::ssize(tokens)) - 60);
    const auto end = tokens.begin() + std::min<int64_t>(from + 60, std::ssize(tokens));
    return service_.tokenizer.decode(std::vector<int32_t>(begin, end));
  }
  const ScriptedService& service_;
  std::vector<int64_t> expected_;
};

/// What Anthropic's packages build out of a stream, with what they insist on.
json message_of(const Reply& reply) {
  json message;
  bool open = false, over = false;
  std::string input;
  for (const auto& [name, event] : sse_of(reply)) {
    EXPECT_EQ(event.at("type"), name);
    EXPECT_FALSE(over) << event;
    if (name == "message_start") {
      EXPECT_TRUE(message.is_null());
      message = event.at("message");
    } else if (name == "content_block_start") {
      EXPECT_FALSE(open);
      open = true;
      EXPECT_EQ(event.at("index"), message.at("content").size());
      message["content"].push_back(event.at("content_block"));
      input.clear();
    } else if (name == "content_block_delta") {
      EXPECT_TRUE(open);
      json& block = message["content"].back();
      const json& delta = event.at("delta");
      const std::string type = delta.at("type");
      const std::map<std::string, std::pair<std::string, std::string>> kinds = {
          {"text_delta", {"text", "text"}},
          {"thinking_delta", {"thinking", "thinking"}},
          {"signature_delta", {"thinking", "signature"}}};
      if (type == "input_json_delta") {
        EXPECT_EQ(block.at("type"), "tool_use");
        input += delta.at("partial_json").get<std::string>();
        block["input"] = json::parse(input, nullptr, false);
      } else {
        const auto& [kind, field] = kinds.at(type);
        EXPECT_EQ(block.at("type"), kind);
        block[field] = block.at(field).get<std::string>() + delta.at(field).get<std::string>();
      }
    } else if (name == "content_block_stop") {
      EXPECT_TRUE(open);
      open = false;
    } else if (name == "message_delta") {
      EXPECT_FALSE(open);
      message.update(event.at("delta"));
      for (const auto& [field, value] : event.at("usage").items()) {
        if (field.ends_with("input_tokens")) {
          EXPECT_EQ(value, message.at("usage").at(field)) << field;
        }
      }
      message["usage"].update(event.at("usage"));
    } else if (name == "message_stop") {
      over = true;
    } else {
      EXPECT_EQ(name, "ping") << event;
    }
  }
  EXPECT_TRUE(over) << reply.body;
  return message;
}

/// Marks of what to cache move to the last block of the conversation in every request.
void move_cache_marks(json& messages) {
  for (json& message : messages) {
    if (!message.at("content").is_array()) continue;
    for (json& block : message["content"]) block.erase("cache_control");
  }
  json& last = messages.back().at("content");
  if (last.is_array() && !last.empty()) last.back()["cache_control"] = {{"type", "ephemeral"}};
}

ServerOptions agent_options() {
  ServerOptions options;
  options.api_keys = {"test-key"};
  options.any_model = true;
  return options;
}

TEST(AgentReplay, ClaudeCodesFirstRequests) {
  const json session = recorded("claude_code.json");
  ScriptedService service(agent_options());
  const std::string headers = header_lines(session.at("headers"));
  for (const json& probe : session.at("probes")) {
    json body = probe.at("body");
    for (const json& key : probe.value("of_session", json::array()))
      body[key.get<std::string>()] = session.at("body").at(key.get<std::string>());
    service.answer = body.contains("output_config") ? R"({"title": "Mend the parser"})" : "Hi.";
    if (body.value("thinking", json::object()).value("type", "") == "enabled")
      service.answer = "Thought.</think>Hi.";
    const std::string path = probe.at("path");
    const Reply reply = service.post(path, body.dump(), headers);
    ASSERT_EQ(reply.status, 200) << probe.at("name") << reply.body;
    if (path.find("count_tokens") != std::string::npos) {
      EXPECT_GT(json::parse(reply.body).at("input_tokens"), 3);
    } else if (body.value("stream", false)) {
      EXPECT_EQ(message_of(reply).at("stop_reason"), "end_turn");
    } else {
      EXPECT_EQ(json::parse(reply.body).at("model"), body.at("model"));
    }
  }
  EXPECT_EQ(service.client().get("/", headers).status, 404);  // no page here, but an answer
}

class ClaudeCode : public ::testing::TestWithParam<const char*> {};

TEST_P(ClaudeCode, ASessionOfTenTurnsReusesEveryToken) {
  const json session = recorded("claude_code.json");
  ScriptedService service(agent_options());
  const std::string path = session.at("path"), headers = header_lines(session.at("headers"));
  json body = session.at("body");
  body["thinking"] = json::parse(GetParam());
  const bool thinks = body["thinking"]["type"] != "disabled";
  Prefixes prefixes(service);
  size_t turn = 0;
  for (const json& step : session.at("turns")) {
    const std::string where = "turn " + std::to_string(++turn);
    const std::string nonce = session.at("nonces").at(turn);
    body["system"][0]["text"] = "x-anthropic-billing-header: cc_version=2.1.208." +
                                nonce.substr(2) + "; cc_entrypoint=cli; cch=" + nonce + ";";
    move_cache_marks(body["messages"]);
    service.answer = written(step.at("answer"), thinks);
    const Reply reply = service.post(path, body.dump(), headers);
    ASSERT_EQ(reply.status, 200) << where << reply.body;
    json message = message_of(reply);
    prefixes.check(where);
    json counted = body;
    for (const char* key : {"max_tokens", "stream", "metadata", "context_management"})
      counted.erase(key);
    const Reply count =
        service.post("/v1/messages/count_tokens?beta=true", counted.dump(), headers);
    const json& usage = message.at("usage");
    EXPECT_EQ(json::parse(count.body).at("input_tokens"),
              usage.at("input_tokens").get<int64_t>() +
                  usage.at("cache_read_input_tokens").get<int64_t>());
    // Every call arrived with its arguments.
    std::vector<std::string> ids;
    size_t calls = 0;
    for (const json& block : message.at("content")) {
      if (block.at("type") != "tool_use") continue;
      const json& call = step.at("answer").at("calls").at(calls++);
      EXPECT_EQ(block.at("name"), call.at("name")) << where;
      EXPECT_EQ(block.at("input"), call.at("arguments")) << where;
      ids.push_back(block.at("id"));
    }
    EXPECT_EQ(calls, step.at("answer").at("calls").size()) << where;
    EXPECT_EQ(message.at("stop_reason"), calls > 0 ? "tool_use" : "end_turn") << where;
    body["messages"].push_back({{"role", "assistant"}, {"content", message.at("content")}});
    json then = step.at("then");
    put_ids(then, ids);
    for (json& more : then) body["messages"].push_back(std::move(more));
  }
  EXPECT_EQ(turn, 10u);
}

INSTANTIATE_TEST_SUITE_P(Thinking,
                         ClaudeCode,
                         ::testing::Values(R"({"type": "adaptive"})",
                                           R"({"type": "adaptive", "display": "omitted"})",
                                           R"({"type": "enabled", "budget_tokens": 31999})",
                                           R"({"type": "disabled"})"));

/// The finished items of a response's stream, as Codex keeps them: what the events built must be
/// what they end with.
json items_of(const Reply& reply) {
  json items = json::array();
  std::map<std::string, std::string> streamed;  // by the item's id
  int64_t next = 0;
  json last;
  for (const auto& [name, event] : sse_of(reply)) {
    EXPECT_EQ(event.at("type"), name);
    EXPECT_EQ(event.at("sequence_number"), next++);
    if (name == "response.output_item.done") items.push_back(event.at("item"));
    if (name.ends_with(".delta"))
      streamed[event.at("item_id").get<std::string>()] += event.at("delta").get<std::string>();
    last = event;
  }
  EXPECT_EQ(last.at("type"), "response.completed") << reply.body;
  EXPECT_EQ(last.at("response").at("output"), items);
  for (const json& item : items) {
    const std::string& text = streamed[item.at("id").get<std::string>()];
    const std::string type = item.at("type");
    if (type == "message") {
      EXPECT_EQ(item.at("content").at(0).at("text"), text);
    } else if (type == "function_call") {
      EXPECT_EQ(item.at("arguments"), text);
    } else if (type == "custom_tool_call") {
      EXPECT_EQ(item.at("input"), text);
    }
  }
  return items;
}

TEST(AgentReplay, ASessionOfCodexReusesEveryToken) {
  const json session = recorded("codex.json");
  ScriptedService service(agent_options());
  const std::string path = session.at("path"), headers = header_lines(session.at("headers"));
  json body = session.at("body");
  Prefixes prefixes(service);
  size_t turn = 0;
  for (const json& step : session.at("turns")) {
    const std::string where = "turn " + std::to_string(++turn);
    service.answer = written(step.at("answer"), true);
    const Reply reply = service.post(path, body.dump(), headers);
    ASSERT_EQ(reply.status, 200) << where << reply.body;
    const json items = items_of(reply);
    prefixes.check(where);
    std::vector<std::string> ids;
    for (json item : items) {
      const std::string type = item.at("type");
      if (type == "reasoning") {
        // Codex keeps nothing but what is sealed, and asks for it.
        EXPECT_TRUE(item.at("encrypted_content").is_string()) << where;
        item["content"] = nullptr;
      } else if (type == "function_call" || type == "custom_tool_call") {
        const json& call = step.at("answer").at("calls").at(ids.size());
        EXPECT_EQ(item.at("name"), call.at("name")) << where;
        if (type == "custom_tool_call") {
          EXPECT_EQ(item.at("input"), call.at("custom")) << where;
        } else {
          EXPECT_EQ(json::parse(item.at("arguments").get<std::string>()), call.at("arguments"));
        }
        ids.push_back(item.at("call_id"));
      }
      item.erase("id");
      item.erase("status");
      body["input"].push_back(item);
    }
    EXPECT_EQ(ids.size(), step.at("answer").at("calls").size()) << where;
    json then = step.at("then");
    put_ids(then, ids);
    for (json& more : then) body["input"].push_back(std::move(more));
  }
  EXPECT_EQ(turn, 10u);
}

}  // namespace
}  // namespace hadal::server
