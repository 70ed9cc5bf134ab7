// Custom tools in both of OpenAI's APIs, and what `allowed_tools` allows.
#include <gtest/gtest.h>

#include "engine_core/grammar/grammar.h"
#include "testing/api_harness.h"
#include "text/tool_calls.h"

namespace hadal::server {
namespace {

class ToolForms : public testing::ApiHarness {
 protected:
  struct Api {
    const char* path;
    bool nested;
  };
  static constexpr std::array<Api, 2> kApis = {
      {{"/v1/chat/completions", true}, {"/v1/responses", false}}};

  static std::string body(const Api& api, const std::string& more) {
    return concat(
        "{", api.nested ? R"("messages": [{"role": "user", "content": "hi"}])" : R"("input": "hi")",
        ", ", more, "}");
  }
  static std::string entry(const Api& api, const std::string& type, const std::string& fields) {
    return api.nested ? concat(R"({"type": ")", type, R"(", ")", type, R"(": {)", fields, "}}")
                      : concat(R"({"type": ")", type, R"(", )", fields, "}");
  }
  /// Tools f, g and h, none strict.
  static std::string tools(const Api& api) {
    std::string list;
    for (const char* name : {"f", "g", "h"})
      list += concat(list.empty() ? "" : ", ",
                     entry(api, "function", concat(R"("name": ")", name, "\"")));
    return concat(R"("tools": [)", list, "]");
  }
  static std::string allowed(const Api& api, const std::string& mode, const std::string& names) {
    std::string list;
    for (const char name : names)
      list += concat(list.empty() ? "" : ", ",
                     entry(api, "function", concat(R"("name": ")", std::string(1, name), "\"")));
    const std::string inner = concat(R"("mode": ")", mode, R"(", "tools": [)", list, "]");
    return concat(R"(, "tool_choice": {"type": "allowed_tools", )",
                  api.nested ? concat(R"("allowed_tools": {)", inner, "}") : inner, "}");
  }
  /// Whether the grammar of the last request takes an answer that calls the tool; "": plain text.
  bool takes(const std::string& name, const std::string& arguments = R"({"a": "b"})") {
    engine_core::GrammarCompiler compiler(tokenizer_);
    engine_core::GrammarSession session(compiler.compile(last().grammar), last().thinking);
    text::ChatPrompt prompt;
    prompt.text = name.empty() ? "Hello" : "\n\n";
    if (!name.empty())
      text::write_tool_calls(std::vector<text::ToolCall>{{name, arguments}}, prompt);
    if (last().thinking && !session.accept(tokenizer_.id_of("</think>"))) return false;
    for (const int32_t id : tokenizer_.encode(prompt.text, prompt.foreign))
      if (!session.accept(id)) return false;
    return session.completed();
  }
};

TEST_F(ToolForms, AllowedToolsInBothModes) {
  for (const Api& api : kApis) {
    for (const char* thinking : {R"(, "thinking": false)", R"(, "thinking": true)"}) {
      post(api.path, body(api, tools(api) + allowed(api, "auto", "gh") + thinking));
      ASSERT_EQ(status_, 200);
      EXPECT_TRUE(takes("g") && takes("h", "{}") && takes("")) << api.path << thinking;
      EXPECT_FALSE(takes("f")) << api.path << thinking;
      EXPECT_NE(prompt_of_last().find("\"f\""), std::string::npos) << "all are shown";
      post(api.path, body(api, tools(api) + allowed(api, "required", "g") + thinking));
      ASSERT_EQ(status_, 200);
      EXPECT_TRUE(takes("g", "{}")) << api.path << thinking;
      EXPECT_FALSE(takes("g")) << "it has no parameters";
      EXPECT_FALSE(takes("f", "{}") || takes("h", "{}") || takes("")) << api.path << thinking;
    }
    // Without a mode it is "auto"; none that may be called is no tool at all.
    const std::string no_mode =
        concat(R"(, "tool_choice": {"type": "allowed_tools", )",
               api.nested ? R"("allowed_tools": {"tools": []}})" : R"("tools": []})");
    post(api.path, body(api, tools(api) + no_mode));
    EXPECT_EQ(status_, 200);
    EXPECT_EQ(last().grammar.kind, engine_core::Grammar::Kind::kNone);
  }
}

TEST_F(ToolForms, AllowedToolsThatAreNotThere) {
  for (const Api& api : kApis) {
    const auto refused = [&](const std::string& choice, const char* problem) {
      const Json reply = post(api.path, body(api, tools(api) + choice));
      EXPECT_EQ(status_, 400) << choice;
      EXPECT_NE(at(reply, "error.message").find(problem), std::string::npos) << reply.dump();
    };
    refused(allowed(api, "auto", "gx"), "no tool is named 'x'");
    refused(allowed(api, "required", "x"), "no tool is named 'x'");
    refused(allowed(api, "always", "g"), "expected auto or required");
    refused(R"(, "tool_choice": {"type": "allowed_tools"})",
            api.nested ? "allowed_tools" : "expected a list of tools");
    const Json reply =
        post(api.path, body(api, concat(R"("tools": [])", allowed(api, "required", "g"))));
    EXPECT_EQ(status_, 400) << reply.dump();
  }
  EXPECT_TRUE(engine_.requests().empty());
}

std::string custom(const std::string& format) {
  return concat(R"("name": "query", "description": "Asks.")", format.empty() ? "" : ", ", format);
}
std::string format_of(bool nested, const std::string& syntax, const std::string& definition) {
  const std::string inner =
      concat(R"("syntax": ")", syntax, R"(", "definition": )", text::quote_json(definition));
  return nested ? concat(R"("format": {"type": "grammar", "grammar": {)", inner, "}}")
                : concat(R"("format": {"type": "grammar", )", inner, "}");
}

TEST_F(ToolForms, ACustomToolsGrammarIsKept) {
  const std::string good = R"({"input": "id=17"})", bad = R"({"input": "id=x"})";
  for (const Api& api : kApis) {
    for (const auto& [syntax, definition] :
         {std::pair<std::string, std::string>("regex", R"(id=\d+)"),
          {"lark", "start: \"id=\" INT\n%import common.INT"}}) {
      const std::string list = concat(
          R"("tools": [)", entry(api, "custom", custom(format_of(api.nested, syntax, definition))),
          ", ", entry(api, "function", R"("name": "f")"), "]");
      post(api.path, body(api, list + R"(, "thinking": false)"));
      ASSERT_EQ(status_, 200);
      EXPECT_TRUE(takes("query", good) && takes("") && takes("f", R"({"a": "b"})")) << syntax;
      EXPECT_FALSE(takes("query", bad)) << syntax;
      EXPECT_NE(prompt_of_last().find(concat("follows this ", syntax, " grammar")),
                std::string::npos);
      EXPECT_EQ(prompt_of_last().find("\"syntax\""), std::string::npos);
      const std::string forced =
          concat(R"(, "tool_choice": )", entry(api, "custom", R"("name": "query")"));
      post(api.path, body(api, list + forced));
      EXPECT_TRUE(takes("query", good)) << syntax;
      EXPECT_FALSE(takes("query", bad) || takes("") || takes("f")) << syntax;
    }
    // Without a grammar any text will do.
    post(api.path, body(api, concat(R"("tools": [)", entry(api, "custom", custom("")), "]")));
    EXPECT_EQ(status_, 200);
    EXPECT_EQ(last().grammar.kind, engine_core::Grammar::Kind::kNone);
  }
}

TEST_F(ToolForms, ACustomToolsGrammarThatCannotBeKept) {
  for (const Api& api : kApis) {
    const auto ask = [&](const std::string& format) {
      return post(api.path,
                  body(api, concat(R"("tools": [)", entry(api, "custom", custom(format)), "]")));
    };
    const size_t before = engine_.requests().size();
    for (const auto& [format, problem] : std::vector<std::pair<std::string, std::string>>{
             {format_of(api.nested, "gbnf", "root ::= x"), "expected lark or regex"},
             {R"("format": {"type": "grammar"})", "definition"},
             {R"("format": {"type": "yaml"})", "expected text or grammar"}}) {
      const Json reply = ask(format);
      EXPECT_EQ(status_, 400) << reply.dump();
      EXPECT_NE(at(reply, "error.message").find(problem), std::string::npos) << reply.dump();
    }
    EXPECT_EQ(engine_.requests().size(), before);
    // The engine refuses what does not compile, and with it the request.
    for (const auto& [syntax, definition] : std::vector<std::pair<std::string, std::string>>{
             {"regex", "(?=a)b"}, {"lark", "start: x"}}) {
      ask(format_of(api.nested, syntax, definition));
      engine_core::GrammarCompiler compiler(tokenizer_);
      EXPECT_THROW(compiler.compile(last().grammar), InputError) << definition;
    }
  }
}

constexpr const char* kChat = "/v1/chat/completions";

TEST_F(ToolForms, CustomCallsOfAChat) {
  const std::vector<text::ToolCall> list = {{"f", R"({"a": 1})"},
                                            {"query", R"({"input": "say \"hi\"\n"})"}};
  answers_ = {"</think>so\n\n" + text::write_tool_calls(list)};
  const std::string request =
      body(kApis[0], concat(R"("tools": [)", entry(kApis[0], "function", R"("name": "f")"), ", ",
                            entry(kApis[0], "custom", custom("")), "]"));
  const Json reply = post(kChat, request);
  ASSERT_EQ(status_, 200) << reply.dump();
  const std::string call = "choices.0.message.tool_calls.";
  EXPECT_EQ(at(reply, call + "0.type"), "\"function\"");
  EXPECT_EQ(at(reply, call + "0.function.arguments"), R"("{\"a\": 1}")");
  EXPECT_EQ(at(reply, call + "1.type"), "\"custom\"");
  EXPECT_EQ(at(reply, call + "1.custom.name"), "\"query\"");
  EXPECT_EQ(at(reply, call + "1.custom.input"), R"("say \"hi\"\n")");
  EXPECT_EQ(at(reply, call + "1.function"), "nothing");
  EXPECT_EQ(at(reply, "choices.0.finish_reason"), "\"tool_calls\"");

  std::string input, name;
  for (const Event& event :
       stream(kChat, request.substr(0, request.size() - 1) + R"(, "stream": true})")) {
    const std::string delta = "choices.0.delta.tool_calls.0.";
    if (at(event.data, delta + "index") != "1") continue;
    EXPECT_EQ(at(event.data, delta + "function"), "nothing") << event.data.dump();
    if (at(event.data, delta + "custom.name") != "nothing") {
      name += at(event.data, delta + "custom.name");
      EXPECT_EQ(at(event.data, delta + "type"), "\"custom\"");
    }
    const std::string more = at(event.data, delta + "custom.input");
    if (more != "nothing") input += Json::parse(more, "input").text();
  }
  EXPECT_EQ(name, "\"query\"");
  EXPECT_EQ(input, "say \"hi\"\n");

  // It comes back with the next turn as it was written.
  const std::string id = at(reply, call + "1.id");
  post(kChat, concat(R"({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant",
      "tool_calls": [{"type": "custom", "id": )",
                     id, R"(, "custom": {"name": "query", "input": "say \"hi\"\n"}}]},
      {"role": "tool", "tool_call_id": )",
                     id, R"(, "content": "done"}]})"));
  ASSERT_EQ(status_, 200);
  EXPECT_NE(prompt_of_last().find("string=\"true\">say \"hi\"\n</"), std::string::npos)
      << prompt_of_last();
}

}  // namespace
}  // namespace hadal::server
