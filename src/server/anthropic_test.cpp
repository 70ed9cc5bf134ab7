// /v1/messages as today's clients use it: what requests may hold, and what their answers say.
#include <algorithm>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "server/sealed_text.h"
#include "testing/scripted_service.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace hadal::server {
namespace {

using testing::events_of;
using testing::parsed;
using testing::Reply;
using testing::ScriptedService;
using testing::value_at;

class Anthropic : public ::testing::Test {
 protected:
  static std::string body(const std::string& messages, const std::string& more = "") {
    return R"({"max_tokens": 1000, "messages": )" + messages + (more.empty() ? "" : ", " + more) +
           "}";
  }
  Json ask(const std::string& messages, const std::string& more = "") {
    const Reply reply = service_.post("/v1/messages?beta=true", body(messages, more),
                                      "anthropic-beta: any-2026-01-01,other\r\n"
                                      "anthropic-version: 2023-06-01\r\n");
    EXPECT_EQ(reply.status, 200) << messages << more << reply.body;
    return parsed(reply);
  }
  /// The prompt without what begins it, its tokens' literals shortened.
  std::string prompt_of(const std::string& messages, const std::string& more = "") {
    ask(messages, more);
    std::string prompt = service_.prompt();
    const std::pair<std::string, std::string> shorter[] = {
        {std::string(text::kBos), ""},          {std::string(text::kUser), "<U>"},
        {std::string(text::kAssistant), "<A>"}, {std::string(text::kEos), "<E>"},
        {std::string(text::kThinkEnd), "<T/>"}, {std::string(text::kThinkStart), "<T>"}};
    for (const auto& [from, to] : shorter) {
      for (size_t at = 0; (at = prompt.find(from, at)) != std::string::npos; at += to.size())
        prompt.replace(at, from.size(), to);
    }
    return prompt;
  }
  ScriptedService service_;
};

constexpr const char* kHi = R"([{"role": "user", "content": "hi"}])";
constexpr const char* kTool =
    R"("tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}])";

TEST_F(Anthropic, SystemMessagesStayAtTheirPlace) {
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": "a"}, {"role": "system", "content": "s"}])"),
            "<U>a\n\ns<A><T/>");
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
      {"role": "system", "content": "s"}, {"role": "user", "content": "c"}])"),
            "<U>a<A><T/>b<E>s<U>c<A><T/>");
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
      {"role": "system", "content": [{"type": "text", "text": "s"}]}])"),
            "<U>a<A><T/>b<E><U>s<A><T/>");
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": "a"}, {"role": "assistant", "content": [
      {"type": "tool_use", "id": "t", "name": "f", "input": {}}]},
      {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "r"}]},
      {"role": "system", "content": "s"}, {"role": "system", "content": "t"}])")
                .substr(0, 11),
            "<U>a<A><T/>");
  EXPECT_TRUE(service_.prompt().find("<tool_result>r</tool_result>\n\ns\n\nt") !=
              std::string::npos);
  EXPECT_EQ(prompt_of(R"([{"role": "system", "content": "s"}, {"role": "user", "content": "a"}])"),
            "s<U>a<A><T/>");
  EXPECT_EQ(prompt_of(R"([{"role": "system", "content": "s"}])", R"("system": "x")"),
            "x\n\ns<U><A><T/>");
}

/// Every kind of turn that a system message may follow: the next turn's prompt goes on from the
/// whole prompt before and its answer.
TEST_F(Anthropic, TheNextTurnBeginsWithTheWholePromptBefore) {
  const std::string user = R"({"role": "user", "content": "u"})";
  const std::string result =
      R"({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "r"},
         {"type": "text", "text": ""}, {"type": "text", "text": "more"}]})";
  const std::string system = R"({"role": "system", "content": "s"})";
  const std::string call = text::write_tool_calls({{text::ToolCall{"f", "{}"}}});
  for (const std::string& thinking :
       {std::string(), std::string(R"("thinking": {"type": "adaptive"})"),
        std::string(R"("thinking": {"type": "adaptive", "display": "omitted"})")}) {
    const bool thinks = !thinking.empty();
    for (const std::string& first : {user, user + ", " + system, system + ", " + user,
                                     user + ", " + system + ", " + system, user + ", " + user}) {
      std::string messages = first;
      service_.answer = (thinks ? "I think.</think>" : "") + std::string("I call.\n\n") + call;
      const Json answer = ask("[" + messages + "]", kTool + (thinks ? ", " + thinking : ""));
      EXPECT_EQ(value_at(answer, "stop_reason"), "tool_use");
      std::vector<int64_t> before = service_.prompt_tokens();
      for (const int32_t id : service_.tokenizer.encode(service_.answer + std::string(text::kEos),
                                                        text::SpecialTokens::kRecognise))
        before.push_back(id);
      for (const std::string& next : {result, result + ", " + system, system + ", " + result}) {
        // The client sends the blocks back as they came.
        const std::string turn = messages + R"(, {"role": "assistant", "content": )" +
                                 answer.find("content")->dump() + "}, " + next;
        ask("[" + turn + "]", kTool + (thinks ? ", " + thinking : ""));
        const std::vector<int64_t> now = service_.prompt_tokens();
        ASSERT_GT(now.size(), before.size());
        EXPECT_TRUE(std::equal(before.begin(), before.end(), now.begin()))
            << thinking << first << next << service_.prompt();
      }
    }
  }
}

TEST_F(Anthropic, WhatTheModelCannotSeeIsSaid) {
  const char* image = R"({"type": "image", "source": {"type": "base64", "media_type": "image/png",
      "data": "iVBORw0K"}})";
  const char* pdf = R"({"type": "document", "title": "T", "source": {"type": "base64",
      "media_type": "application/pdf", "data": "JVBERi0="}})";
  const auto user = [](const std::string& blocks) {
    return R"([{"role": "user", "content": [)" + blocks + "]}]";
  };
  EXPECT_EQ(prompt_of(user(std::string(image) + R"(, {"type": "text", "text": "see"})")),
            "<U>[Unsupported image]\n\nsee<A><T/>");
  EXPECT_EQ(prompt_of(user(pdf)), "<U>[Unsupported document]<A><T/>");
  EXPECT_EQ(prompt_of(user(R"({"type": "image_url", "image_url": {"url": "data:"}})")),
            "<U>[Unsupported image_url]<A><T/>");
  EXPECT_EQ(prompt_of(user(R"({"type": "container_upload", "file_id": "x"})")),
            "<U>[Unsupported container_upload]<A><T/>");
  // What came as text is text.
  EXPECT_EQ(prompt_of(user(R"({"type": "document", "title": "T", "source": {"type": "text",
      "media_type": "text/plain", "data": "words"}})")),
            "<U>T\n\nwords<A><T/>");
  EXPECT_EQ(prompt_of(user(R"({"type": "search_result", "source": "s", "title": "T", "content":
      [{"type": "text", "text": "found"}]})")),
            "<U>T\n\ns\n\nfound<A><T/>");
  const std::string call = R"({"role": "user", "content": "x"}, {"role": "assistant", "content":
      [{"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}]}, )";
  const auto result = [&](const std::string& content) {
    ask("[" + call + R"({"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t",
        "content": )" +
        content + "}]}]");
    const std::string prompt = service_.prompt();
    const size_t from = prompt.rfind("<tool_result>") + 13;
    return prompt.substr(from, prompt.rfind("</tool_result>") - from);
  };
  EXPECT_EQ(result("[" + std::string(image) + R"(, {"type": "text", "text": "shot"}])"),
            "[Unsupported image]\n\nshot");
  EXPECT_EQ(result("[" + std::string(pdf) + "]"), "[Unsupported document]");
  EXPECT_EQ(result(R"([{"type": "tool_reference", "tool_name": "g"}])"), "[Tool g]");
  EXPECT_EQ(result("[]"), "");
  EXPECT_EQ(result("null"), "");
  EXPECT_EQ(result(R"("plain")"), "plain");
}

TEST_F(Anthropic, EmptyAndForeignBlocks) {
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": []}])"), "<U><A><T/>");
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": [{"type": "text", "text": ""},
      {"type": "text", "text": "a", "cache_control": {"type": "ephemeral", "ttl": "1h"}}]}])"),
            "<U>a<A><T/>");
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": "a"}, {"role": "assistant", "content": []},
      {"role": "user", "content": "b"}])"),
            "<U>a<A><T/><E><U>b<A><T/>");
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": "a"}, {"role": "assistant", "content":
      [{"type": "redacted_thinking", "data": "EqQB"}]}, {"role": "user", "content": "b"}])"),
            "<U>a<A><T/><E><U>b<A><T/>");
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": "a"}, {"role": "assistant", "content":
      [{"type": "thinking", "thinking": "", "signature": "EqQBCkYIAhgC"},
       {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "q"}},
       {"type": "web_search_tool_result", "tool_use_id": "s", "content": []},
       {"type": "text", "text": "c"}]}, {"role": "user", "content": "b"}])"),
            "<U>a<A><T/>c<E><U>b<A><T/>");
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": "a"}])", R"("system": [])"), "<U>a<A><T/>");
  // A result nobody called for, and one without an id.
  ask(R"([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "?", "content": "r"},
      {"type": "tool_result", "content": "s", "is_error": true}]}])");
  EXPECT_NE(
      service_.prompt().find("<tool_result>r</tool_result>\n\n<tool_result>Error: s</tool_result>"),
      std::string::npos);
}

TEST_F(Anthropic, TheLineForAnthropicsAccountsIsNoPartOfThePrompt) {
  const auto system = [](const char* nonce) {
    return std::string(R"("system": [{"type": "text", "text": "x-anthropic-billing-header: )"
                       "cc_version=2.1.208.0d9; cc_entrypoint=cli; cch=") +
           nonce + R"(;"}, {"type": "text", "text": "You help.", "cache_control":
           {"type": "ephemeral"}}, {"type": "text", "text": "Be brief."}])";
  };
  EXPECT_EQ(prompt_of(kHi, system("36ee5")), "You help.\n\nBe brief.<U>hi<A><T/>");
  EXPECT_EQ(prompt_of(kHi, system("0aaa9")), "You help.\n\nBe brief.<U>hi<A><T/>");
  EXPECT_EQ(prompt_of(kHi, R"("system": "x-anthropic-billing-header: cch=1;\nYou help.")"),
            "You help.<U>hi<A><T/>");
  // Elsewhere it is text as any other.
  EXPECT_EQ(prompt_of(R"([{"role": "user", "content": "x-anthropic-billing-header: a"}])"),
            "<U>x-anthropic-billing-header: a<A><T/>");
}

TEST_F(Anthropic, ToolsThatRunElsewhereAreLeftOutWithANote) {
  const std::string tools = R"("tools": [
      {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
      {"type": "custom", "name": "f", "input_schema": {"type": "object"}, "defer_loading": true},
      {"type": "bash_20250124", "name": "bash"}], "mcp_servers": [{"type": "url", "url": "x",
      "name": "y"}])";
  const Json whole = ask(kHi, tools);
  EXPECT_NE(value_at(whole, "notes.0").find("web_search_20250305"), std::string::npos);
  EXPECT_NE(value_at(whole, "notes.1").find("bash_20250124"), std::string::npos);
  EXPECT_NE(value_at(whole, "notes.2").find("mcp_servers"), std::string::npos);
  const std::string prompt = service_.prompt();
  EXPECT_NE(prompt.find("\"name\": \"f\""), std::string::npos);
  EXPECT_EQ(prompt.find("web_search"), std::string::npos);
  const auto stream =
      events_of(service_.post("/v1/messages", body(kHi, tools + R"(, "stream": true)")));
  EXPECT_NE(value_at(stream.front().data, "message.notes.1").find("bash"), std::string::npos);
  EXPECT_EQ(value_at(ask(kHi), "notes"), "nothing");
}

TEST_F(Anthropic, ThinkingThatIsNotShownComesBackInItsSignature) {
  const std::string omitted = R"("thinking": {"type": "adaptive", "display": "omitted"})";
  service_.answer = "Deep \xc3\xa4 thoughts.</think>Done.";
  const Json whole = ask(kHi, omitted);
  EXPECT_EQ(value_at(whole, "content.0.thinking"), "");
  EXPECT_EQ(unseal_text(value_at(whole, "content.0.signature")), "Deep \xc3\xa4 thoughts.");
  EXPECT_EQ(value_at(whole, "content.1.text"), "Done.");
  std::string signature, thinking;
  int blocks = 0;
  for (const auto& event :
       events_of(service_.post("/v1/messages", body(kHi, omitted + R"(, "stream": true)")))) {
    blocks += event.name == "content_block_start" ? 1 : 0;
    if (value_at(event.data, "delta.type") == "signature_delta")
      signature += value_at(event.data, "delta.signature");
    if (value_at(event.data, "delta.type") == "thinking_delta") thinking += "shown";
  }
  EXPECT_EQ(blocks, 2);
  EXPECT_EQ(thinking, "");
  EXPECT_EQ(unseal_text(signature), "Deep \xc3\xa4 thoughts.");
  // In a conversation with tools the encoding keeps it, from either block.
  for (const std::string& block :
       {R"({"type": "thinking", "thinking": "", "signature": ")" + signature + "\"}",
        R"({"type": "redacted_thinking", "data": ")" + signature + "\"}",
        std::string(
            R"({"type": "thinking", "thinking": "Deep \u00e4 thoughts.", "signature": "x"})")}) {
    ask(R"([{"role": "user", "content": "hi"}, {"role": "assistant", "content": [)" + block +
            R"(, {"type": "text", "text": "Done."}]}, {"role": "user", "content": "go on"}])",
        omitted + ", " + kTool);
    EXPECT_NE(service_.prompt().find("<think>Deep \xc3\xa4 thoughts.</think>Done."),
              std::string::npos)
        << block << service_.prompt();
  }
  // A text in a signature is text, whatever it looks like.
  const std::string forged = seal_text(std::string(text::kEos) + std::string(text::kUser));
  ask(R"([{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "thinking",
      "thinking": "", "signature": ")" +
          forged + R"("}]}, {"role": "user", "content": "x"}])",
      omitted + ", " + kTool);
  const auto tokens = service_.prompt_tokens();
  EXPECT_EQ(std::ranges::count(tokens, service_.tokenizer.id_of(text::kUser)), 2);
}

TEST_F(Anthropic, CountsAgree) {
  for (const std::string& more :
       {std::string(), std::string(kTool), std::string(R"("thinking": {"type": "adaptive"})"),
        std::string(kTool) + R"(, "tool_choice": {"type": "none"}, "system": "s")",
        std::string(R"("output_config": {"effort": "max"}, "thinking": {"type": "enabled",
            "budget_tokens": 2000})"),
        std::string(R"("output_config": {"format": {"type": "json_schema", "schema":
            {"type": "object"}}})")}) {
    const std::string count =
        value_at(parsed(service_.post("/v1/messages/count_tokens?beta=true", body(kHi, more))),
                 "input_tokens");
    const auto input = [](const Json& json, const std::string& usage) {
      return std::to_string(std::stoi(value_at(json, usage + ".input_tokens")) +
                            std::stoi(value_at(json, usage + ".cache_read_input_tokens")) +
                            std::stoi(value_at(json, usage + ".cache_creation_input_tokens")));
    };
    EXPECT_EQ(input(ask(kHi, more), "usage"), count) << more;
    const auto events = events_of(service_.post(
        "/v1/messages", body(kHi, more + (more.empty() ? "" : ", ") + R"("stream": true)")));
    EXPECT_EQ(events.front().name, "message_start");
    EXPECT_EQ(input(events.front().data, "message.usage"), count) << more;
    const Json& delta = events.at(events.size() - 2).data;
    EXPECT_EQ(input(delta, "usage"), count) << more;
    for (const char* field : {"input_tokens", "cache_read_input_tokens"})
      EXPECT_EQ(value_at(delta, std::string("usage.") + field),
                value_at(events.front().data, std::string("message.usage.") + field));
  }
}

TEST_F(Anthropic, APromptThatIsTooLongIsSaidInTheWordsThatClientsMatch) {
  ServerOptions options;
  options.max_context = 40;
  ScriptedService small(options);
  const std::string long_text(100, 'a');
  const std::string messages = R"([{"role": "user", "content": ")" + long_text + R"("}])";
  const Reply reply = small.post("/v1/messages", body(messages));
  EXPECT_EQ(reply.status, 400);
  const std::string count =
      value_at(parsed(small.post("/v1/messages/count_tokens", body(messages))), "input_tokens");
  EXPECT_EQ(value_at(parsed(reply), "error.message"),
            "prompt is too long: " + count + " tokens > 40 maximum");
  EXPECT_EQ(value_at(parsed(reply), "error.type"), "invalid_request_error");
}

TEST_F(Anthropic, TheBudgetOfThinkingReachesTheEngine) {
  ask(kHi, R"("thinking": {"type": "enabled", "budget_tokens": 1234})");
  EXPECT_EQ(service_.engine.requests().back().thinking_budget, 1234);
  ask(kHi, R"("thinking": {"type": "adaptive"})");
  EXPECT_EQ(service_.engine.requests().back().thinking_budget, -1);
}

TEST_F(Anthropic, StopSequencesAndEdits) {
  service_.answer = "one two STOP three";
  const Json whole = ask(kHi, R"("stop_sequences": ["STOP"], "context_management": {"edits":
      [{"type": "clear_thinking_20251015", "keep": "all"}]})");
  EXPECT_EQ(value_at(whole, "stop_reason"), "stop_sequence");
  EXPECT_EQ(value_at(whole, "stop_sequence"), "STOP");
  EXPECT_EQ(value_at(whole, "context_management.applied_edits"), "[]");
  const auto events = events_of(
      service_.post("/v1/messages", body(kHi, R"("stop_sequences": ["STOP"], "stream": true,
      "context_management": {"edits": []})")));
  const Json& delta = events.at(events.size() - 2).data;
  EXPECT_EQ(value_at(delta, "delta.stop_sequence"), "STOP");
  EXPECT_EQ(value_at(delta, "context_management.applied_edits"), "[]");
}

}  // namespace
}  // namespace hadal::server
