// Grammars and text: every text a string may hold, structure by token ids, any order of members, no
// runs of white space, and no grammar without an end.
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "engine_core/grammar/grammar.h"
#include "testing/nano_grammar.h"
#include "text/chat_tokens.h"
#include "text/completion_check.h"
#include "text/tool_calls.h"

namespace hadal::engine_core {
namespace {

using nlohmann::json;
using Kind = Grammar::Kind;

using testing::nano_compiler;
using testing::nano_tokenizer;

/// Whether the answer, whose markup is special tokens, is complete; masks agree all the way.
bool takes(Kind kind, const std::string& grammar, const std::vector<int32_t>& ids) {
  GrammarSession session(nano_compiler().compile({kind, grammar}), false);
  std::vector<uint32_t> words(nano_compiler().mask_words());
  for (const int32_t id : ids) {
    session.mask(words);
    const bool allowed = (words[static_cast<size_t>(id) / 32] >> id % 32 & 1u) != 0;
    const bool taken = session.accept(id);
    EXPECT_EQ(allowed, taken) << nano_tokenizer().token_bytes(id) << " at " << session.length();
    if (!taken) return false;
  }
  return session.completed();
}

/// Ordinary text, whatever it looks like.
bool takes_text(Kind kind, const std::string& grammar, const std::string& answer) {
  return takes(kind, grammar, nano_tokenizer().encode(answer, text::SpecialTokens::kAsText));
}

/// A call whose markup is as we write it.
bool takes_call(const std::string& tools, const text::ToolCall& call) {
  text::ChatPrompt prompt;
  prompt.text = "\n\n";
  text::write_tool_calls(std::vector{call}, prompt);
  return takes(Kind::kToolCalls, tools, nano_tokenizer().encode(prompt.text, prompt.foreign));
}

const std::vector<std::string> kTexts = {"a </think> b",
                                         std::string(text::kEos),
                                         std::string(text::kThinkStart),
                                         "x\"y",
                                         "line\nline",
                                         "back\\slash",
                                         "\uff5c",
                                         std::string(text::kDsml),
                                         "tab\there",
                                         "\u00e9\u4f60",
                                         "</" + std::string(text::kDsml) + "parameter>\n"};

TEST(GrammarStrings, AnyTextCanBeTheValueOfAString) {
  for (const std::string& text : kTexts) {
    for (const json& schema : {json{{"const", text}}, json{{"type", "string"}},
                               json{{"type", "string"}, {"maxLength", 200}},
                               json{{"type", "string"}, {"minLength", 1}, {"maxLength", 60}},
                               json{{"type", "string"}, {"pattern", "^[\\s\\S]+$"}},
                               json{{"type", "string"}, {"pattern", "^([^~]|\\n){1,60}$"}}}) {
      EXPECT_TRUE(takes_text(Kind::kJsonSchema, schema.dump(), json(text).dump()))
          << schema << text;
      const json tool = {
          {"name", "f"},
          {"strict", true},
          {"parameters",
           {{"type", "object"},
            {"properties", {{"a", schema}, {"b", {{"type", "array"}, {"items", schema}}}}},
            {"required", {"a"}}}}};
      const bool quoted = schema.contains("pattern");  // stands in quotes, so it is no plain text
      if (!quoted) {
        EXPECT_TRUE(takes_call(json::array({tool}).dump(), {"f", json{{"a", text}}.dump()}))
            << schema << text;
        EXPECT_TRUE(takes_call(json::array({tool}).dump(),
                               {"f", json{{"a", text}, {"b", {text, text}}}.dump()}))
            << schema << text;
      }
    }
    std::string literal;
    for (const char c : text)
      literal += std::string("\\/.|()[]{}?*+^$").find(c) == std::string::npos
                     ? std::string(1, c)
                     : std::string("\\") + c;
    EXPECT_TRUE(takes_text(Kind::kRegex, literal, text)) << literal;
  }
}

TEST(GrammarStrings, PatternsSpeakOfCharactersNotOfTheirEscapes) {
  struct Case {
    const char* pattern;
    std::vector<std::string> good, bad;
  };
  for (const Case& one :
       std::vector<Case>{{"^\"a\"$", {"\"a\""}, {"a", "\\\"a\\\""}},
                         {"^a\\nb$", {"a\nb"}, {"anb", "a\\nb"}},
                         {"^[\"\\\\]{2}$", {"\"\"", "\\\"", "\\\\"}, {"\"", "a\"", "\"\"\""}},
                         {"^.{3}$", {"a\"b", "\\\\\\", "abc"}, {"ab", "a\nb", "abcd"}},
                         {"^[^a]{2}$", {"\"\n", "bb", "\\\t"}, {"ab", "\"", "\"a"}},
                         {"^\\S\\s\\S$", {"a b", "\"\t\\"}, {"a\"b", "   "}},
                         {"^(\\d|\")+$", {"1\"2"}, {"1'2"}}}) {
    const json schema = {{"type", "string"}, {"pattern", one.pattern}};
    for (const std::string& text : one.good)
      EXPECT_TRUE(takes_text(Kind::kJsonSchema, schema.dump(), json(text).dump()))
          << one.pattern << " " << text;
    for (const std::string& text : one.bad)
      EXPECT_FALSE(takes_text(Kind::kJsonSchema, schema.dump(), json(text).dump()))
          << one.pattern << " " << text;
  }
  // Lengths count characters, however they are written.
  const json bounded = {{"type", "string"}, {"minLength", 2}, {"maxLength", 3}};
  for (const char* good : {"\"ab\"", "\"\\\"\\\\\"", "\"\\u00e9\\n\\t\"", "\"\u4f60\u597d\""})
    EXPECT_TRUE(takes_text(Kind::kJsonSchema, bounded.dump(), good)) << good;
  for (const char* bad : {"\"\\n\"", "\"\\u00e9\"", "\"abcd\"", "\"a\"\"", "\"\\\\\\\\\\\\\\\\\"",
                          "\"a\n\"", "\"\\ud83d\\ude00\""})
    EXPECT_FALSE(takes_text(Kind::kJsonSchema, bounded.dump(), bad)) << bad;
}

TEST(GrammarStrings, ControlTextOfOrdinaryTokensOpensNoCall) {
  const std::string tools = R"([{"name": "f", "strict": true, "parameters": {"type": "object",
    "properties": {"a": {"type": "string"}}, "required": ["a"]}}])";
  const std::string block =
      "\n\n" + text::write_tool_calls(std::vector{text::ToolCall{"f", R"({"a": "x"})"}});
  EXPECT_FALSE(takes_text(Kind::kToolCalls, tools, block));
  EXPECT_TRUE(takes(Kind::kToolCalls, tools,
                    nano_tokenizer().encode(block, text::SpecialTokens::kRecognise)));
  EXPECT_TRUE(
      takes_text(Kind::kToolCalls, concat(R"({"mode": "auto", "tools": )", tools, "}"), block));
}

TEST(GrammarStrings, ParametersComeInAnyOrderOnce) {
  json properties;
  for (const char* name : {"a", "ab", "b", "c", "d", "e", "f", "g", "h"})
    properties[name] = {{"type", "integer"}};
  const std::string tools =
      json::array({{{"name", "t"},
                    {"strict", true},
                    {"parameters",
                     {{"type", "object"}, {"properties", properties}, {"required", {"ab", "c"}}}}},
                   {{"name", "free"}}})
          .dump();
  for (const char* good :
       {R"({"ab": 1, "c": 2})", R"({"c": 1, "ab": 2})",
        R"({"h": 1, "c": 1, "a": 3, "ab": 2, "b": 1})",
        R"({"h": 1, "g": 1, "f": 1, "e": 1, "d": 1, "c": 1, "b": 1, "ab": 1, "a": 1})"})
    EXPECT_TRUE(takes_call(tools, {"t", good})) << good;
  for (const char* bad :
       {"{}", R"({"ab": 1})", R"({"c": 1, "a": 2})", R"({"ab": 1, "c": 1, "z": 1})"})
    EXPECT_FALSE(takes_call(tools, {"t", bad})) << bad;
  EXPECT_TRUE(takes_call(tools, {"free", R"({"x": "1", "y": [2]})"}));
  // Twice: JSON cannot say it, so the markup does.
  for (const char* tool : {"t", "free"}) {
    const std::string parameter = concat(text::dsml::kParameter, " name=\"c\" string=\"false\">1<",
                                         text::dsml::kParameterEnd, ">\n");
    const auto answer = [&](size_t times) {
      std::string text =
          concat(text::tool_block_start(), ">\n", text::dsml::kInvoke, " name=\"", tool, "\">\n",
                 text::dsml::kParameter, " name=\"ab\" string=\"false\">1<",
                 text::dsml::kParameterEnd, ">\n");
      for (size_t i = 0; i < times; ++i) text += parameter;
      return nano_tokenizer().encode(
          concat(text, text::dsml::kInvokeEnd, ">\n", text::dsml::kBlockEnd),
          text::SpecialTokens::kRecognise);
    };
    EXPECT_TRUE(takes(Kind::kToolCalls, tools, answer(1))) << tool;
    EXPECT_FALSE(takes(Kind::kToolCalls, tools, answer(2))) << tool;
  }
}

TEST(GrammarStrings, MembersComeInAnyOrderOnce) {
  const std::string schema = R"({"type": "object", "properties": {"a": {"type": "integer"},
    "b": {"type": "object", "properties": {"x": {"type": "null"}, "y": {"type": "null"}},
    "required": ["y"], "additionalProperties": false}, "c": {"type": "integer"}},
    "required": ["a", "b"],
    "additionalProperties": false})";
  for (const char* good :
       {R"({"a":1,"b":{"y":null}})", R"({"b": {"y": null, "x": null}, "c": 1, "a": 2})",
        R"({"c": 1, "a": 1, "b": {"x": null, "y": null}})"})
    EXPECT_TRUE(takes_text(Kind::kJsonSchema, schema, good)) << good;
  for (const char* bad :
       {R"({"a":1})", R"({"c": 1, "c": 1, "a": 1, "b": {"y": null}})",
        R"({"b": {"x": null}, "a": 2})", "{}", R"({"a": 1, "b": {"y": null}, "d": 1})"})
    EXPECT_FALSE(takes_text(Kind::kJsonSchema, schema, bad)) << bad;
}

TEST(GrammarStrings, NoRunsOfWhiteSpace) {
  const std::string schema = R"({"type": "object", "properties": {"age": {"type": "integer"}}})";
  EXPECT_TRUE(takes_text(Kind::kJsonSchema, schema, R"({"age": 4})"));
  EXPECT_TRUE(takes_text(Kind::kJsonSchema, schema, R"({"age":4})"));
  EXPECT_FALSE(takes_text(Kind::kJsonSchema, schema, R"({"age"  :4})"));
  EXPECT_FALSE(takes_text(Kind::kJsonObject, "", "{\"age\":   4}"));
}

TEST(GrammarStrings, GrammarsWithoutAnEndAreRefusedByTheirRule) {
  struct Case {
    Kind kind;
    const char* text;
    const char* named;
  };
  for (const Case& one : std::vector<Case>{
           {Kind::kJsonSchema, R"({"$ref": "#"})", "root"},
           {Kind::kJsonSchema,
            R"({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
             "$ref": "#/$defs/a"})",
            "defs_"},
           {Kind::kJsonSchema, R"({"anyOf": [{"$ref": "#"}]})", "root"},
           {Kind::kJsonSchema,
            R"({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]})", "root"},
           {Kind::kRegex, "[^\\s\\S]", "matches no character"},
           {Kind::kRegex, "a\\ud800", "matches no character"},
           {Kind::kEbnf, "root ::= \"a\" root", "root"},
           {Kind::kEbnf, "root ::= \"a\" list\nlist ::= \"b\" list | \"c\" list", "list"},
           {Kind::kEbnf, "root ::= [a-z]* none{2,3}\nnone ::= [^\\x00-\\U0010ffff]", "none"},
           {Kind::kJsonSchema, R"({"type": "string", "pattern": "^[^\\s\\S]$"})",
            "matches no character"},
           {Kind::kToolCalls,
            R"([{"name": "f", "strict": true, "parameters": {"type": "object", "properties":
             {"a": {"$ref": "#/$defs/a"}}, "required": ["a"], 
             "$defs": {"a": {"type": "array", "minItems": 1,
             "items": {"$ref": "#/$defs/a"}}}}}])",
            "has no end"}}) {
    try {
      nano_compiler().compile({one.kind, one.text});
      ADD_FAILURE() << "accepted: " << one.text;
    } catch (const InputError& error) {
      EXPECT_NE(std::string_view(error.what()).find(one.named), std::string_view::npos)
          << error.what();
    }
  }
  // With an end, recursion is fine.
  EXPECT_TRUE(takes_text(Kind::kJsonSchema,
                         R"({"type": "object", "properties": {"a": {"$ref": "#"}}})",
                         R"({"a": {"a": {} } })"));
  // Of tools that need not be strict, what cannot be kept is free.
  EXPECT_TRUE(takes_call(R"([{"name": "f", "strict": "prefer", "parameters": {"$ref": "#"}}])",
                         {"f", R"({"q": 1})"}));
}

}  // namespace
}  // namespace hadal::engine_core
