// What becomes of an answer in every API: structure by token ids, complete calls, stop strings,
// ends.
#include <functional>
#include <regex>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "testing/answer_fixture.h"
#include "text/chat_tokens.h"
#include "text/irregular_calls.h"

namespace hadal::server {
namespace {

using nlohmann::json;
using testing::AnswerTest;
using testing::SeenAnswer;

std::string call_markup(const std::string& value = "x") {
  return concat(
      "\n\n", text::write_tool_calls(std::vector{text::ToolCall{"f", json{{"a", value}}.dump()}}));
}

TEST_F(AnswerTest, EveryShapeOfACallInEveryApi) {
  for (int bits = 0; bits < 512; ++bits) {
    text::IrregularShape shape = text::IrregularShape::of(bits);
    shape.which_bad = bits % text::IrregularShape::kBad;
    const text::IrregularCompletion written = text::write_irregular(shape);
    script_ = written.text.substr(0, written.text.size() - text::kEos.size());
    for (const Route route : kRoutes) {
      const SeenAnswer seen = ask_both(route, true);
      ASSERT_EQ(seen.reasoning, written.reasoning) << script_;
      ASSERT_EQ(seen.content, written.content) << script_;
      ASSERT_EQ(seen.calls.size(), written.calls.size()) << script_ << seen.raw;
      for (size_t i = 0; i < seen.calls.size(); ++i) {
        ASSERT_EQ(seen.calls[i].first, written.calls[i].name);
        ASSERT_EQ(seen.calls[i].second, written.calls[i].arguments);
      }
      const char* const finish[] = {"tool_calls", "completed", "tool_use"};
      ASSERT_EQ(seen.finish, finish[static_cast<size_t>(route)]);
      if (route != Route::kResponses) {
        ASSERT_EQ(!seen.malformed.empty(), written.lost) << seen.malformed;
      }
    }
  }
  EXPECT_NE(metrics().find("hadal_malformed_answers_total 1536\n"), std::string::npos);
}

TEST_F(AnswerTest, WhatIsIncompleteIsNeverAPlainStop) {
  for (const std::string& script :
       {concat("c\n\n<", text::kDsml, "tool_calls>\n<", text::kDsml, "invoke name=\"f\">\n<",
               text::kDsml, "parameter name=\"a\" string=\"true\">half"),
        concat("c\n\n<", text::kDsml, "tool_calls>\n<", text::kDsml, "invoke>\n</", text::kDsml,
               "invoke>"),
        concat("c\n\n<", text::kDsml, "nonsense>")}) {
    script_ = script;
    for (const Route route : kRoutes) {
      const SeenAnswer seen = ask_both(route, false);
      EXPECT_EQ(seen.content, "c") << script;
      EXPECT_TRUE(seen.calls.empty()) << script;
      const char* const finish[] = {"length", "incomplete", "max_tokens"};
      EXPECT_EQ(seen.finish, finish[static_cast<size_t>(route)]) << script;
      EXPECT_EQ(seen.raw.find("DSML"), std::string::npos);
    }
    EXPECT_NE(ask(Route::kChat, false, false).malformed, "");
  }
}

TEST_F(AnswerTest, LookAlikesDrawnAsOrdinaryTokensAreText) {
  const auto plain = [](const std::string& text) {  // every literal of it ordinary
    std::string script;
    for (size_t pos = 0; pos < text.size();) {
      const auto [offset, size] = text::find_special(std::string_view(text).substr(pos));
      script += text.substr(pos, offset);
      if (size > 0) script += "\x1a" + text.substr(pos + offset, size);
      pos += offset + size;
    }
    return script;
  };
  for (const std::string& text :
       {concat("a ", text::kThinkEnd, " b"), std::string(text::kThinkStart),
        std::string(text::kEos),
        concat("\n\n<", text::kDsml, "tool_calls>\n<", text::kDsml, "invoke name=\"f\">"),
        std::string("\uff5c"), std::string("x<\uff5c"), concat("</", text::kDsml, "parameter>")}) {
    const std::string inside = call_markup("VALUE");
    const size_t at = inside.find("VALUE");
    for (const Route route : kRoutes) {
      script_ = concat(plain(text), text::kThinkEnd, plain(text));
      SeenAnswer seen = ask_both(route, true);
      EXPECT_EQ(seen.reasoning, text);
      EXPECT_EQ(seen.content, text);
      EXPECT_TRUE(seen.calls.empty());
      script_ = concat(inside.substr(0, at), plain(text), inside.substr(at + 5));
      seen = ask_both(route, false);
      ASSERT_EQ(seen.calls.size(), 1u);
      EXPECT_EQ(json::parse(seen.calls[0].second), json({{"a", text}}));
    }
    // Ended by length, nothing of it is lost.
    script_ = plain(text) + "more";
    const auto size = tokenizer_.encode(text, text::SpecialTokens::kAsText).size();
    EXPECT_EQ(ask_both(Route::kChat, false, concat("\"max_tokens\": ", size)).content, text);
    EXPECT_EQ(ask_both(Route::kChat, true, concat("\"max_tokens\": ", size)).reasoning, text);
  }
}

TEST_F(AnswerTest, StopStringsSeeVisibleTextOnly) {
  for (const char* stop :
       {R"("\n\n")", R"("</")", R"("<")", R"("a")", R"("\n")", R"("parameter")", R"("x")"}) {
    for (const Route route : kRoutes) {
      const std::string more =
          concat(route == Route::kMessages ? R"("stop_sequences": [)" : R"("stop": [)", stop, "]");
      script_ = concat("one\n\ntwo xa</think>I c", call_markup());
      const SeenAnswer seen = ask_both(route, true, more);
      EXPECT_EQ(seen.reasoning, "one\n\ntwo xa") << stop;
      EXPECT_EQ(seen.content, "I c") << stop;
      ASSERT_EQ(seen.calls.size(), 1u) << stop;
      EXPECT_EQ(seen.calls[0].second, R"({"a": "x"})") << stop;
    }
  }
  // In what is visible they stop, and say so.
  for (const auto& [stop, content] :
       std::vector<std::pair<const char*, const char*>>{{R"("\n\n")", "p"},
                                                        {R"("</")", "p\n\nq "},
                                                        {R"("b>")", "p\n\nq </"},
                                                        {R"("q <")", "p\n\n"}}) {
    script_ = "why</think>p\n\nq </b> r";
    EXPECT_EQ(ask_both(Route::kChat, true, concat("\"stop\": ", stop)).content, content);
    EXPECT_EQ(ask_both(Route::kMessages, true, concat("\"stop_sequences\": [", stop, "]")).finish,
              "stop_sequence");
  }
}

TEST_F(AnswerTest, AnEndInsideTheReasoningIsTold) {
  script_ = "why";
  const char* const finish[] = {"length", "incomplete", "max_tokens"};
  for (const Route route : kRoutes) {
    const SeenAnswer seen = ask_both(route, true);
    EXPECT_EQ(seen.reasoning, "why");
    EXPECT_EQ(seen.content, "");
    EXPECT_EQ(seen.finish, finish[static_cast<size_t>(route)]);
    EXPECT_NE(seen.malformed, "");
    EXPECT_TRUE(last().close_reasoning);  // the engine would have gone on
  }
  EXPECT_NE(metrics().find("hadal_open_reasoning_answers_total 6\n"), std::string::npos);
}

TEST_F(AnswerTest, AnIgnoredEndIsNoText) {
  script_ = concat("a", text::kEos, "b");
  const SeenAnswer seen = ask_both(Route::kChat, false, R"("ignore_eos": true)");
  EXPECT_EQ(seen.content, "ab");
  EXPECT_EQ(seen.finish, "stop");
  EXPECT_TRUE(last().ignore_eos);
}

TEST_F(AnswerTest, ForcedCallsFormatsAndLimitsAreTheGrammars) {
  script_ = "why</think>" + call_markup();
  using Kind = engine_core::Grammar::Kind;
  const std::string format =
      R"("response_format": {"type": "json_schema",
      "json_schema": {"name": "n", "schema": {"type": "integer"}}})";
  // Forced, with a format beside and thinking on: think, then call.
  SeenAnswer seen = ask_both(Route::kChat, true, concat(R"("tool_choice": "required", )", format));
  EXPECT_EQ(seen.calls.size(), 1u);
  EXPECT_TRUE(last().thinking);
  EXPECT_EQ(last().grammar.kind, Kind::kToolCalls);
  EXPECT_TRUE(last().grammar.must_call);
  EXPECT_EQ(last().grammar.text.find("content"), std::string::npos);
  // A format beside tools: either.
  ask(Route::kChat, false, false, format);
  EXPECT_EQ(last().grammar.kind, Kind::kToolCalls);
  json grammar = json::parse(last().grammar.text);
  EXPECT_EQ(grammar["mode"], "auto");
  EXPECT_EQ(grammar["content"]["kind"], "json_schema");
  EXPECT_EQ(json::parse(grammar["content"]["text"].get<std::string>()),
            json({{"type", "integer"}}));
  EXPECT_EQ(grammar["tools"].size(), 2u);
  EXPECT_NE(last_prompt().find("## Response Format"), std::string::npos);
  EXPECT_NE(last_prompt().find("### Available Tool Schemas"), std::string::npos);
  // One call at a time.
  script_ = call_markup() + call_markup();
  for (const Route route : kRoutes) {
    const std::string one =
        route == Route::kMessages
            ? R"("tool_choice": {"type": "any", "disable_parallel_tool_use": true})"
            : R"("tool_choice": "required", "parallel_tool_calls": false)";
    EXPECT_EQ(ask_both(route, false, one).calls.size(), 1u);
    EXPECT_EQ(json::parse(last().grammar.text)["parallel"], false);
  }
  // Left to the model, without anything strict, there is no grammar.
  ask(Route::kChat, false, false);
  EXPECT_EQ(last().grammar.kind, Kind::kNone);
}

TEST_F(AnswerTest, HistoryIsRenderedWhateverItsArguments) {
  const auto prompt_of = [&](const std::string& arguments) {
    const HttpResponse reply = post(
        "/v1/chat/completions",
        concat(
            R"({"thinking": false, "messages": [{"role": "user", "content": "x"},
             {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function",
             "function": {"name": "f", "arguments": )",
            arguments, R"(}}]}, {"role": "tool", "tool_call_id": "other", "content": "r"}]})"));
    EXPECT_EQ(reply.status, 200) << arguments << reply.body;
    return last_prompt();
  };
  const auto parameter = [](const char* key, const char* mark, const char* value) {
    return concat(text::dsml::kParameter, " name=\"", key, "\" string=\"", mark, "\">", value, "<",
                  text::dsml::kParameterEnd, ">");
  };
  for (const auto& [arguments, value] :
       std::vector<std::pair<const char*, const char*>>{{R"("[1,2]")", "[1,2]"},
                                                        {R"("3")", "3"},
                                                        {R"("null")", "null"},
                                                        {R"("{oops")", "{oops"},
                                                        {R"("")", ""}})
    EXPECT_NE(prompt_of(arguments).find(parameter("arguments", "true", value)), std::string::npos)
        << arguments;
  EXPECT_NE(prompt_of(R"("{\"k\": 1.50}")").find(parameter("k", "false", "1.5")),
            std::string::npos);
}

TEST_F(AnswerTest, ACallSentBackIsWrittenAsTheModelWroteIt) {
  // Attributes in the other order, CRLF between the tags, a number marked as a string.
  const std::string markup = concat("<", text::kDsml, "invoke name=\"f\">\r\n<", text::kDsml,
                                    "parameter string=\"false\" name=\"n\">1.50</", text::kDsml,
                                    "parameter></", text::kDsml, "invoke>");
  script_ =
      concat("\n\n<", text::kDsml, "tool_calls>\n", markup, "\n</", text::kDsml, "tool_calls>");
  const SeenAnswer seen = ask(Route::kChat, false, false);
  const json call = json::parse(seen.raw)["choices"][0]["message"]["tool_calls"][0];
  EXPECT_EQ(call["function"]["arguments"], R"({"n": 1.5})");
  const auto prompt_with = [&](json changed) {
    const json messages = {
        {{"role", "user"}, {"content", "x"}},
        {{"role", "assistant"}, {"content", ""}, {"tool_calls", {std::move(changed)}}},
        {{"role", "tool"}, {"tool_call_id", call["id"]}, {"content", "r"}}};
    post("/v1/chat/completions", json{{"thinking", false}, {"messages", messages}}.dump());
    return last_prompt();
  };
  EXPECT_NE(prompt_with(call).find(markup), std::string::npos);
  json other = call;
  other["function"]["arguments"] = R"({"n":1.5})";  // the same, written otherwise
  EXPECT_NE(prompt_with(other).find(markup), std::string::npos);
  other["function"]["arguments"] = R"({"n": 2})";
  EXPECT_EQ(prompt_with(other).find(markup), std::string::npos);
  other = call;
  other["id"] = "unknown";
  EXPECT_EQ(prompt_with(other).find(markup), std::string::npos);
}

TEST(CallMemory, ForgetsTheOldest) {
  CallMemory memory(4000);
  text::ToolCall call{"f", "{}", {"odd", {}}};
  for (int i = 0; i < 100; ++i) memory.remember(std::to_string(i), call);
  EXPECT_LE(memory.bytes(), 4000u);
  EXPECT_FALSE(memory.recall("0", call).has_value());
  ASSERT_TRUE(memory.recall("99", call).has_value());
  EXPECT_EQ(memory.recall("99", call)->text, "odd");
  // What we would write the same needs no memory.
  call = {"f",
          "{}",
          {concat(text::dsml::kInvoke, " name=\"f\">\n\n", text::dsml::kInvokeEnd, ">"), {}}};
  memory.remember("canonical", call);
  EXPECT_FALSE(memory.recall("canonical", call).has_value());
}

}  // namespace
}  // namespace hadal::server
