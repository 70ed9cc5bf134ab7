// Shapes of /v1/chat/completions that today's clients send: each is honoured, or refused by name.
#include <gtest/gtest.h>

#include "testing/api_harness.h"
#include "text/chat_tokens.h"

namespace hadal::server {
namespace {

class ChatShapesTest : public testing::ApiHarness {
 protected:
  static constexpr const char* kPath = "/v1/chat/completions";
  static std::string body(const std::string& messages, const std::string& more = "") {
    return R"({"messages": [)" + messages + "]" + (more.empty() ? "" : ", " + more) + "}";
  }
  Json chat(const std::string& messages, const std::string& more = R"("thinking": false)") {
    const Json reply = post(kPath, body(messages, more));
    EXPECT_EQ(status_, 200) << reply.dump();
    return reply;
  }
  /// The prompt, its special tokens shortened.
  std::string prompt() const {
    std::string text = prompt_of_last();
    for (const auto& [from, to] :
         std::vector<std::pair<std::string, std::string>>{{std::string(text::kBos), "<B>"},
                                                          {std::string(text::kUser), "<U>"},
                                                          {std::string(text::kAssistant), "<A>"},
                                                          {std::string(text::kEos), "<E>"}}) {
      for (size_t at; (at = text.find(from)) != std::string::npos;)
        text.replace(at, from.size(), to);
    }
    return text;
  }
};

constexpr const char* kHi = R"({"role": "user", "content": "hi"})";

TEST_F(ChatShapesTest, SystemMessagesAnywhere) {
  const auto system = [](const std::string& text) {
    return R"({"role": "system", "content": ")" + text + "\"}";
  };
  const std::string hi = kHi, yes = R"({"role": "assistant", "content": "yes"})";
  chat(system("S"));
  EXPECT_EQ(prompt(), "<B>S<U><A></think>");
  // The next turn begins with the whole of it.
  chat(system("S") + "," + yes + "," + hi);
  EXPECT_EQ(prompt(), "<B>S<U><A></think>yes<E><U>hi<A></think>");
  chat(hi + "," + system("S"));
  EXPECT_EQ(prompt(), "<B><U>hi\n\nS<A></think>");
  chat(hi + "," + system("S") + "," + yes + "," + hi);
  EXPECT_EQ(prompt(), "<B><U>hi\n\nS<A></think>yes<E><U>hi<A></think>");
  chat(hi + R"(, {"role": "developer", "content": "D"})");
  EXPECT_EQ(prompt(), "<B><U>hi\n\nD<A></think>");
  chat(hi + "," + yes + "," + system("S") + "," + hi);
  EXPECT_EQ(prompt(), "<B><U>hi<A></think>yes<E>S<U>hi<A></think>");
  chat(hi + "," + yes + "," + system("S"));
  EXPECT_EQ(prompt(), "<B><U>hi<A></think>yes<E><U>S<A></think>");
  chat(system("S") + "," + system("T") + "," + hi);
  EXPECT_EQ(prompt(), "<B>ST<U>hi<A></think>");
}

TEST_F(ChatShapesTest, PartsThatAreNoText) {
  chat(R"({"role": "user", "content": [{"type": "text", "text": "see"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    {"type": "input_audio", "input_audio": {}}, {"type": "file", "file": {}}, "and"]})");
  EXPECT_EQ(prompt(),
            "<B><U>see\n\n[Unsupported image]\n\n[Unsupported audio]\n\n[Unsupported file]\n\nand"
            "<A></think>");
  chat(std::string(kHi) + R"(, {"role": "assistant", "content": [{"type": "refusal",
    "refusal": "no"}]}, {"role": "user", "content": []})");
  EXPECT_EQ(prompt(), "<B><U>hi<A></think>no<E><U><A></think>");
}

TEST_F(ChatShapesTest, HistoryOfCallsIsRendered) {
  for (const char* arguments : {"null", "[1, 2]", "3", "\"\"", "\"no json\"", R"({"a": 1})"}) {
    chat(std::string(kHi) + R"(, {"role": "assistant", "content": null, "tool_calls": [{"id": "c",
      "type": "function", "function": {"name": "f", "arguments": )" +
         arguments + R"(}}]}, {"role": "tool", "tool_call_id": "other", "content": "42"})");
    EXPECT_NE(prompt().find("<tool_result>42</tool_result>"), std::string::npos) << arguments;
  }
  chat(R"({"role": "tool", "content": [{"type": "image_url"}]})");
  EXPECT_NE(prompt().find("<tool_result>[Unsupported image]</tool_result>"), std::string::npos);
}

TEST_F(ChatShapesTest, FinalMessages) {
  const std::string well = std::string(kHi) + R"(, {"role": "assistant", "content": "Well"})";
  chat(well, R"("continue_final_message": true, "add_generation_prompt": false)");
  EXPECT_EQ(prompt(), "<B><U>hi<A></think>Well");
  chat(well, R"("continue_final_message": true)");
  EXPECT_EQ(prompt(), "<B><U>hi<A></think>Well");
  chat(well, R"("add_generation_prompt": false, "thinking": false)");
  EXPECT_EQ(prompt(), "<B><U>hi<A></think>Well<E>");
  EXPECT_FALSE(last().thinking);
  chat(kHi, R"("add_generation_prompt": false)");
  EXPECT_EQ(prompt(), "<B><U>hi");
  EXPECT_FALSE(last().thinking);
  for (const auto& [messages, more] : std::vector<std::pair<std::string, std::string>>{
           {well, ""},
           {well, R"("continue_final_message": true, "add_generation_prompt": true)"},
           {kHi, R"("continue_final_message": true)"}}) {
    post(kPath, body(messages, more));
    EXPECT_EQ(status_, 400) << more;
  }
}

TEST_F(ChatShapesTest, EveryWayToSwitchThinking) {
  struct Case {
    const char* fields;
    bool thinking;
    int64_t budget = -1;
  };
  const std::vector<Case> cases = {
      {R"("n": 1)", true},
      {R"("thinking": false)", false},
      {R"("thinking": {"type": "disabled"})", false},
      {R"("thinking": {"type": "adaptive"})", true},
      {R"("thinking": {"type": "enabled", "budget_tokens": 9})", true, 9},
      {R"("enable_thinking": false)", false},
      {R"("chat_template_kwargs": {"thinking": false})", false},
      {R"("chat_template_kwargs": {"enable_thinking": false})", false},
      {R"("chat_template_kwargs": {"thinking_mode": "chat"})", false},
      {R"("chat_template_kwargs": {"reasoning_effort": "none"})", false},
      {R"("chat_template_kwargs": {"enable_thinking": true, "thinking_budget": 7})", true, 7},
      {R"("reasoning": {"enabled": false})", false},
      {R"("reasoning": {"effort": "none"})", false},
      {R"("reasoning": {"effort": "high", "max_tokens": 5})", true, 5},
      {R"("reasoning": {"max_tokens": 0})", false},
      {R"("reasoning_effort": "none")", false},
      {R"("thinking_budget": 3)", true, 3},
      {R"("thinking_token_budget": 0)", false},
      {R"("reasoning_budget": -1)", true},
      {R"("reasoning_budget": 0)", false},
      {R"("enable_thinking": true, "chat_template_kwargs": {"thinking": false})", true},
  };
  for (const Case& c : cases) {
    chat(kHi, c.fields);
    EXPECT_EQ(last().thinking, c.thinking) << c.fields;
    EXPECT_EQ(last().thinking_budget, c.budget) << c.fields;
    EXPECT_TRUE(prompt().ends_with(c.thinking ? "<think>" : "</think>")) << c.fields;
  }
  const std::string turns = std::string(kHi) + R"(, {"role": "assistant", "content": "yes",
    "reasoning": "hm"}, {"role": "user", "content": "so"})";
  chat(turns, R"("chat_template_kwargs": {"thinking": true})");
  EXPECT_EQ(prompt().find("hm"), std::string::npos);
  chat(turns, R"("chat_template_kwargs": {"thinking": true, "drop_thinking": false})");
  EXPECT_NE(prompt().find("hm</think>yes"), std::string::npos) << prompt();
}

TEST_F(ChatShapesTest, AllowedAndHostedTools) {
  const std::string tools = R"("thinking": false, "tools": [{"type": "function", "function":
    {"name": "f"}}, {"type": "web_search_preview"},
    {"type": "function", "function": {"name": "g"}}])";
  const Json reply = chat(kHi, tools);
  EXPECT_NE(at(reply, "notes.0").find("'web_search_preview' does not run here"), std::string::npos);
  EXPECT_EQ(at(reply, "notes.1"), "nothing");
  bool noted = false;
  for (const Event& event : stream(kPath, body(kHi, tools + R"(, "stream": true)")))
    noted = noted || at(event.data, "notes.0") != "nothing";
  EXPECT_TRUE(noted);
  chat(kHi, tools + R"(, "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode":
    "required", "tools": [{"type": "function", "function": {"name": "g"}}]}})");
  EXPECT_TRUE(last().grammar.must_call);
  EXPECT_EQ(last().grammar.text.find("\"f\""), std::string::npos) << last().grammar.text;
}

TEST_F(ChatShapesTest, UsageIdsAndPromptLogprobs) {
  const Json reply = chat(kHi, R"("thinking": false, "return_token_ids": true,
    "prompt_logprobs": 0, "stop_token_ids": [114])");
  EXPECT_EQ(at(reply, "choices.0.message.content"), "\"Hell\"");
  EXPECT_EQ(at(reply, "choices.0.stop_reason"), "114");
  EXPECT_EQ(at(reply, "choices.0.token_ids"), "[75, 104, 111, 111, 114]");
  EXPECT_EQ(at(reply, "choices.0.weights_version"), "0");
  EXPECT_EQ(at(chat(kHi, R"("thinking": false, "return_sampled_logprobs": true,
    "stop_token_ids": [114])"),
               "choices.0.sampled_logprobs"),
            "[-0.25, -0.25, -0.25, -0.25, -0.25]");
  EXPECT_EQ(at(reply, "prompt_token_ids.0"), "0");
  EXPECT_EQ(at(reply, "prompt_logprobs.0"), "null");
  EXPECT_EQ(reply.find("prompt_logprobs")->items().size(), last().prompt.size());
  const auto prompt_tokens = std::ssize(last().prompt);
  EXPECT_EQ(at(reply, "usage.prompt_cache_hit_tokens"), concat(prompt_tokens / 2));
  EXPECT_EQ(at(reply, "usage.prompt_cache_miss_tokens"), concat(prompt_tokens - prompt_tokens / 2));
  EXPECT_NE(at(reply, "usage.timings.first_token_ms"), "nothing");
  std::string ids, prompts;
  for (const Event& event :
       stream(kPath, body(kHi, R"("thinking": false, "return_token_ids": true, "stream": true)"))) {
    if (at(event.data, "prompt_token_ids") != "nothing")
      prompts += at(event.data, "prompt_token_ids");
    const std::string more = at(event.data, "choices.0.token_ids");
    if (more != "nothing" && more != "[]") ids += more.substr(1, more.size() - 2) + ", ";
  }
  EXPECT_EQ(prompts.substr(0, 4), "[0, ");
  EXPECT_EQ(ids, "75, 104, 111, 111, 114, 36, 1, ");
}

TEST_F(ChatShapesTest, LogprobsByIdAndClosedReasoning) {
  const Json reply = chat(kHi, R"("thinking": false, "logprobs": true, "top_logprobs": 1,
    "return_tokens_as_token_ids": true)");
  EXPECT_EQ(at(reply, "choices.0.logprobs.content.0.token"), "\"token_id:75\"");
  EXPECT_EQ(at(reply, "choices.0.logprobs.content.0.top_logprobs.0.token"), "\"token_id:75\"");
  EXPECT_FALSE(last().close_reasoning);
  chat(kHi, R"("close_reasoning": true)");
  EXPECT_TRUE(last().close_reasoning);
}

TEST_F(ChatShapesTest, RefusesByName) {
  struct Case {
    const char* fields;
    const char* message;
  };
  const std::vector<Case> cases = {
      {R"("functions": [{"name": "f"}])", "functions: not supported: use tools"},
      {R"("function_call": {"name": "f"})", "function_call: not supported"},
      {R"("skip_special_tokens": false)", "skip_special_tokens"},
      {R"("chat_template": "x")", "chat_template"},
      {R"("chat_template_kwargs": {"style": "x"})", "chat_template_kwargs.style"},
      {R"("documents": [{"text": "x"}])", "documents"},
      {R"("echo": true)", "echo"},
      {R"("audio": {"voice": "x"})", "audio"},
      {R"("modalities": ["text", "audio"])", "modalities"},
      {R"("tools": [{"type": "made_up"}])", "tools[0].type"},
      {R"("tools": [{"type": "function", "function": {"name": "f"}},
                    {"type": "function", "function": {"name": "f"}}])",
       "another tool 'f'"},
      {R"("prompt_logprobs": 1, "stream": true)", "prompt_logprobs"},
      {R"("regex": "a", "response_format": {"type": "json_object"})", "regex"},
  };
  for (const Case& c : cases) {
    const Json reply = post(kPath, body(kHi, c.fields));
    EXPECT_EQ(status_, 400) << c.fields;
    EXPECT_NE(at(reply, "error.message").find(c.message), std::string::npos) << reply.dump();
  }
  EXPECT_TRUE(engine_.requests().empty());
  chat(kHi, R"("functions": [], "function_call": "auto", "skip_special_tokens": true,
    "modalities": ["text"], "echo": false, "separate_reasoning": true, "logit_bias": null,
    "prompt_cache_key": "k", "user": "u", "store": true, "metadata": {}, "documents": null)");
}

TEST_F(ChatShapesTest, TheContextOverflowsInWordsThatClientsMatch) {
  const Json reply =
      post(kPath, body(R"({"role": "user", "content": ")" + std::string(5000, 'x') + "\"}"));
  EXPECT_EQ(status_, 400);
  EXPECT_EQ(at(reply, "error.message"),
            "\"This model's maximum context length is 4096 tokens. However, your messages resulted "
            "in 5004 tokens. Please reduce the length of the messages.\"");
  EXPECT_EQ(at(reply, "error.code"), "\"context_length_exceeded\"");
}

}  // namespace
}  // namespace hadal::server
