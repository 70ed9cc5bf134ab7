// Bounds on lengths, and other counted repetitions: exact for every token, however large they are.
#include <algorithm>
#include <chrono>
#include <random>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "engine_core/grammar/grammar.h"
#include "testing/grammar_walks.h"
#include "text/tool_calls.h"

namespace hadal::engine_core {
namespace {

using nlohmann::json;
using Kind = Grammar::Kind;
using testing::walks::bit;
using testing::walks::bytes_of;
using testing::walks::compiler;
using testing::walks::cut;
using testing::walks::eos;
using testing::walks::expect_mask_is_acceptance;
using testing::walks::mask_of;
using testing::walks::pick;
using testing::walks::Random;
using testing::walks::seconds_since;
using testing::walks::start;
using testing::walks::takes;
using testing::walks::tokenizer;
using testing::walks::walk;
using testing::walks::Words;

GrammarSession start(const json& schema) { return start(Kind::kJsonSchema, schema.dump()); }

int64_t characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

/// The text of a JSON string of that many characters, each written in one of its ways.
std::string random_string(int64_t length, Random& random) {
  static const std::vector<std::string> ways = {
      "a",      "b",      "hello",  " ",          ".",          "\\\"",    "\\\\",    "\\/",
      "\\n",    "\\t",    "\\b",    "\\f",        "\\r",        "\\u00e9", "\\u4F60", "\\uFFFF",
      "\u00e9", "\u4f60", "\u20ac", "\U0001F600", "\U0010FFFF", "\x7f",    "\\ud7ff", "\\uE000"};
  std::string out;
  for (int64_t count = 0; count < length;) {
    std::string way = random.of(ways);
    if (way == "hello")
      way = way.substr(0, static_cast<size_t>(std::min<int64_t>(5, length - count)));
    count += way[0] == '\\' ? 1 : characters(way);
    out += way;
  }
  return out;
}

json bounded(int64_t least, int64_t most) {
  json schema = {{"type", "string"}};
  if (least >= 0) schema["minLength"] = least;
  if (most >= 0) schema["maxLength"] = most;
  return schema;
}

json random_bounds(Random& random) {
  const int64_t least = random.chance(0.3) ? -1 : random.below(5) * random.below(5);
  if (random.chance(0.2)) return bounded(std::max<int64_t>(least, 0), -1);
  return bounded(least, std::max<int64_t>(least, 0) + random.below(4) * random.below(9));
}

bool fits(const json& value, const json& schema) {
  return value.is_string() &&
         characters(value.get<std::string>()) >= schema.value("minLength", int64_t{0}) &&
         characters(value.get<std::string>()) <= schema.value("maxLength", int64_t{1} << 40);
}

/// The rules of one character of a JSON string and of others, each of two choices: such a rule is
/// repeated by unrolling, which knows nothing of counts.
constexpr const char* kRules = R"(
char ::= [^"\\\x00-\x1f] | "\\" (["\\/bfnrt] | "u" code)
code ::= [0-9a-cA-CefEF] hex hex hex | [dD] [0-7] hex hex
hex ::= [0-9] | [a-fA-F]
letter ::= [a-m] | [n-z]
digit ::= [0-4] | [5-9]
either ::= letter | digit
word ::= "ab" | "c"
)";

/// The masks of two grammars of one language are equal all along random walks.
void expect_same(Kind kind,
                 const std::string& counted,
                 const std::string& unrolled,
                 Random& random) {
  const auto begin = std::chrono::steady_clock::now();
  for (int round = 0; round < 4; ++round) {
    GrammarSession one = start(kind, counted);
    GrammarSession two = start(Kind::kEbnf, concat("root ::= ", unrolled, kRules));
    std::string text;
    // What is unrolled can be slow beyond use.
    for (int step = 0; step < 120 && seconds_since(begin) < 0.5; ++step) {
      const Words words = mask_of(one), others = mask_of(two);
      for (int64_t token = 0; token < tokenizer().vocab_size() && words != others; ++token)
        ASSERT_EQ(bit(words, token), bit(others, token)) << counted << "\n"
                                                         << unrolled << "\n"
                                                         << text << " then " << bytes_of(token);
      int64_t token = pick(words, random);
      if (bit(words, eos()) && (random.chance(0.2) || token < 0)) break;
      ASSERT_GE(token, 0) << counted << "\n" << text;
      ASSERT_TRUE(one.accept(token) && two.accept(token));
      text += bytes_of(token);
      if (token == eos()) break;
    }
  }
}

TEST(GrammarLengths, MasksAreThoseOfUnrolledRepetitions) {
  Random random(1);
  for (int round = 0; round < 25; ++round) {
    const int64_t least = random.below(8), most = least + random.below(12);
    expect_same(Kind::kJsonSchema, bounded(least, most).dump(),
                concat("\"\\\"\" char{", least, ",", most, "} \"\\\"\""), random);
    const int64_t other = random.below(8);
    expect_same(
        Kind::kJsonSchema,
        json{{"anyOf", {bounded(least, most), bounded(other, other + 3), json{{"const", "hello"}}}}}
            .dump(),
        concat("\"\\\"\" (char{", least, ",", most, "} | char{", other, ",", other + 3,
               "} | \"hello\") \"\\\"\""),
        random);
    expect_same(Kind::kJsonSchema, bounded(least, -1).dump(),
                concat("\"\\\"\" char{", least, ",} \"\\\"\""), random);
  }
}

TEST(GrammarLengths, PatternsThatCount) {
  struct Case {
    const char *pattern, *unrolled;
  };
  Random random(2);
  for (const Case& one :
       std::vector<Case>{{"[a-z]{3,40}", "letter{3,40}"},
                         {"[a-z]{3,40}x", "letter{3,40} \"x\""},
                         {"x[a-z]{0,20}[0-9]", "\"x\" letter{0,20} digit"},
                         {"(ab|c){20}", "word{20}"},
                         {"(ab|c){12,40}abc", "word{12,40} \"abc\""},
                         {"[a-z]{2,30}[a-z0-9]{20,40}", "letter{2,30} either{20,40}"},
                         {"([a-z]{1,20}-){1,20}",
                          "([a-z] | [a-z] letter{1,19}) \"-\" "
                          "(([a-z] | [a-z] letter{1,19}) \"-\"){0,19}"},
                         {"(x[0-9]{1,20})?", "(\"x\" digit{1,20})?"},
                         {"([a-z]{20}|[a-z0-9]{5,30}|y)", "(letter{20} | either{5,30} | \"y\")"},
                         {"([a-z]{0,20}|[0-9]{0,30})", "(letter{0,20} | digit{0,30})"},
                         {"[a-z]{18,}[0-9]{2}", "letter{18,} digit{2}"}}) {
    const json schema = {{"type", "string"}, {"pattern", concat("^", one.pattern, "$")}};
    expect_same(Kind::kJsonSchema, schema.dump(), concat("\"\\\"\" ", one.unrolled, " \"\\\"\""),
                random);
    expect_same(Kind::kRegex, one.pattern, one.unrolled, random);
  }
  const json escapes = {{"type", "string"}, {"pattern", "^[^a]{3,9}$"}};
  EXPECT_TRUE(takes(start(escapes), "\"\\\"\\\\\\n\u4f60\"", random));
  EXPECT_FALSE(takes(start(escapes), "\"\\\"\\\\\"", random));
  EXPECT_FALSE(takes(start(escapes), "\"bbba\"", random));
}

/// A pattern and the same language in rules that are unrolled.
struct Expression {
  std::string pattern, rules;
};

Expression random_expression(Random& random, int depth) {
  static const std::vector<Expression> leaves = {
      {"[a-z]", "letter"}, {"[0-9]", "digit"}, {"[a-z0-9]", "either"},
      {"a", "\"a\""},      {"(ab|c)", "word"}, {"(a|ab)", "(\"a\" | \"ab\")"},
      {"-", "\"-\""}};
  if (depth == 0 || random.chance(0.2)) return random.of(leaves);
  const Expression one = random_expression(random, depth - 1);
  switch (random.below(5)) {
    case 0: {
      const Expression two = random_expression(random, depth - 1);
      return {concat(one.pattern, two.pattern), concat(one.rules, " ", two.rules)};
    }
    case 1: {
      const Expression two = random_expression(random, depth - 1);
      return {concat("(", one.pattern, "|", two.pattern, ")"),
              concat("(", one.rules, " | ", two.rules, ")")};
    }
    case 2:
      return {concat("(", one.pattern, ")?"), concat("(", one.rules, ")?")};
    default: {
      const int64_t least = random.below(6), most = least + 1 + random.below(depth == 1 ? 30 : 2);
      const bool open = random.chance(0.2);
      const std::string count =
          open ? concat("{", least, ",}") : concat("{", least, ",", most, "}");
      return {concat("(", one.pattern, ")", count), concat("(", one.rules, ")", count)};
    }
  }
}

TEST(GrammarLengths, RandomPatterns) {
  Random random(7);
  for (int round = 0; round < 60 && !HasFailure(); ++round) {
    const Expression one = random_expression(random, 1 + static_cast<int>(random.below(2)));
    SCOPED_TRACE(one.pattern);
    expect_same(Kind::kRegex, one.pattern, one.rules, random);
    const json schema = {{"type", "string"}, {"pattern", concat("^", one.pattern, "$")}};
    expect_same(Kind::kJsonSchema, schema.dump(), concat("\"\\\"\" ", one.rules, " \"\\\"\""),
                random);
  }
}

TEST(GrammarLengths, EveryStringOfTheLengthAndNoOtherIsTaken) {
  Random random(3);
  for (int round = 0; round < 150; ++round) {
    const json schema = random_bounds(random);
    const auto least = schema.value("minLength", int64_t{0});
    const auto most = schema.value("maxLength", least + 20);
    for (const int64_t length : {least, most, least + random.below(most - least + 1), least - 1,
                                 most + 1, most + 1 + random.below(9)}) {
      if (length < 0) continue;
      const std::string text = concat("\"", random_string(length, random), "\"");
      ASSERT_EQ(takes(start(schema), text, random), fits(json::parse(text), schema))
          << schema << text;
    }
    const std::string text = random_string(least, random);
    for (const char* bad : {"\n", "\x01", "\\x", "\\ud800", "\\udfff", "\\u00g0", "\xed\xa0\x80"})
      ASSERT_FALSE(takes(start(bounded(0, 40)), concat("\"", text, bad, "\""), random)) << bad;
  }
}

TEST(GrammarLengths, BoundsThatAreNoneAreRefused) {
  const auto refused = [](const json& schema, const char* with) {
    try {
      start(json{{"type", "object"}, {"properties", {{"a", schema}}}});
      ADD_FAILURE() << schema;
    } catch (const InputError& error) {
      EXPECT_NE(std::string_view(error.what()).find(with), std::string_view::npos) << error.what();
    }
  };
  refused(bounded(5, 3), ".a: minLength is 5, above maxLength, 3");
  refused(bounded(0, 10'001), ".a: maxLength is 10001, expected a whole number, 0 to 10000");
  refused({{"type", "string"}, {"maxLength", 2.5}},
          ".a: maxLength is 2.5, expected a whole number");
  Random random(8);
  EXPECT_TRUE(takes(start(json{{"type", "string"}, {"maxLength", 3.0}}), "\"abc\"", random));
  EXPECT_FALSE(takes(start(json{{"type", "string"}, {"maxLength", 3.0}}), "\"abcd\"", random));
}

TEST(GrammarLengths, LargeBoundsAreExact) {
  Random random(4);
  for (const auto& [least, most] : std::vector<std::pair<int64_t, int64_t>>{
           {0, 128}, {130, 130}, {999, 10000}, {10000, 10000}}) {
    const json schema = bounded(least, most);
    for (const int64_t length : {least - 1, least, most, most + 1}) {
      if (length < 0) continue;
      const std::string text = concat("\"", random_string(length, random), "\"");
      EXPECT_EQ(takes(start(schema), text, random), fits(json::parse(text), schema))
          << schema << length;
    }
    GrammarSession session = start(schema);
    for (const int64_t token : cut(concat("\"", random_string(most - 3, random)), random))
      ASSERT_TRUE(session.accept(token));
    expect_mask_is_acceptance(session, schema.dump());
  }
  const json pattern = {{"type", "string"}, {"pattern", "^[a-z]{1,5000}x(ab|c){200}$"}};
  std::string text = concat("\"", std::string(5000, 'x'), "x");
  for (int i = 0; i < 200; ++i) text += random.chance(0.5) ? "ab" : "c";
  EXPECT_TRUE(takes(start(pattern), text + "\"", random));
  EXPECT_FALSE(takes(start(pattern), text + "c\"", random));
}

json random_schema(Random& random, int depth) {
  switch (random.below(depth > 0 ? 8 : 3)) {
    case 0:
      return {{"enum", {"hello", "a\"b", 3, "\u4f60"}}};
    case 1:
    case 2:
      return random_bounds(random);
    case 3:
      return {{"type", "array"},
              {"items", random_schema(random, depth - 1)},
              {"minItems", random.below(2)},
              {"maxItems", 1 + random.below(3)}};
    case 4:
      return {{"anyOf", {random_schema(random, depth - 1), random_schema(random, depth - 1)}}};
    case 5: {
      json names = random_bounds(random);
      names["minLength"] = std::max<int64_t>(1, names.value("minLength", int64_t{1}));
      if (names.contains("maxLength") && names["maxLength"] < names["minLength"])
        names["maxLength"] = names["minLength"];
      return {{"type", "object"},
              {"propertyNames", names},
              {"additionalProperties", random_schema(random, depth - 1)}};
    }
    default: {
      json properties = json::object(), required = json::array();
      for (int64_t i = random.below(4); i >= 0; --i) {
        const std::string name = concat("k", i);
        properties[name] = random_schema(random, depth - 1);
        if (random.chance(0.6)) required.push_back(name);
      }
      return {{"type", "object"},
              {"properties", properties},
              {"required", required},
              {"additionalProperties", false}};
    }
  }
}

bool validates(const json& value, const json& schema) {
  if (schema.contains("anyOf"))
    return std::any_of(schema["anyOf"].begin(), schema["anyOf"].end(),
                       [&](const json& one) { return validates(value, one); });
  if (schema.contains("enum"))
    return std::find(schema["enum"].begin(), schema["enum"].end(), value) != schema["enum"].end();
  if (schema["type"] == "string") return fits(value, schema);
  if (schema["type"] == "array") {
    return value.is_array() && std::ssize(value) >= schema["minItems"].get<int64_t>() &&
           std::ssize(value) <= schema["maxItems"].get<int64_t>() &&
           std::all_of(value.begin(), value.end(),
                       [&](const json& one) { return validates(one, schema["items"]); });
  }
  if (!value.is_object()) return false;
  for (const auto& [name, member] : value.items()) {
    if (schema.contains("propertyNames")) {
      if (!fits(name, schema["propertyNames"]) ||
          !validates(member, schema["additionalProperties"]))
        return false;
    } else if (!schema["properties"].contains(name) ||
               !validates(member, schema["properties"][name])) {
      return false;
    }
  }
  for (const json& name : schema.value("required", json::array()))
    if (!value.contains(name.get<std::string>())) return false;
  return true;
}

TEST(GrammarLengths, WalksOfRandomSchemasValidate) {
  Random random(5);
  int ended = 0;
  for (int round = 0; round < 60 && !HasFailure(); ++round) {
    const json schema = random_schema(random, 3);
    SCOPED_TRACE(schema.dump());
    for (int i = 0; i < 2; ++i) {
      GrammarSession session = start(schema);
      const std::string text = walk(session, random);
      if (text.empty()) continue;
      ++ended;
      const json value = json::parse(text, nullptr, false);
      ASSERT_FALSE(value.is_discarded()) << text;
      ASSERT_TRUE(validates(value, schema)) << text;
    }
  }
  EXPECT_GE(ended, 60);
}

TEST(GrammarLengths, ArgumentsOfTools) {
  Random random(6);
  for (int round = 0; round < 8 && !HasFailure(); ++round) {
    const json parameters = {{"type", "object"},
                             {"properties",
                              {{"a", random_bounds(random)},
                               {"b",
                                {{"type", "array"},
                                 {"items", random_bounds(random)},
                                 {"minItems", 1},
                                 {"maxItems", 2}}}}},
                             {"required", {"a", "b"}}};
    const json tools = json::array({{{"name", "f"}, {"strict", true}, {"parameters", parameters}}});
    const std::string grammar = json{{"tools", tools}, {"parallel", false}}.dump();
    GrammarSession session = start(Kind::kToolCalls, grammar);
    walk(session, random, 0.03);
    // A string parameter stands there as it is.
    const auto least = parameters["properties"]["a"].value("minLength", int64_t{0});
    const auto most = parameters["properties"]["a"].value("maxLength", least + 5);
    for (const int64_t length : {least, most, most + 1}) {
      text::ChatPrompt prompt;
      prompt.text = "\n\n";
      const json item = json::parse(
          "\"" +
          random_string(parameters["properties"]["b"]["items"].value("minLength", int64_t{0}),
                        random) +
          "\"");
      const json a = std::string(static_cast<size_t>(length), length % 2 == 0 ? '<' : '"');
      text::write_tool_calls(std::vector{text::ToolCall{"f", json{{"a", a}, {"b", {item}}}.dump()}},
                             prompt);
      GrammarSession call = start(Kind::kToolCalls, grammar);
      bool taken = true;
      for (const int32_t token : tokenizer().encode(prompt.text, prompt.foreign)) {
        const bool allowed = bit(mask_of(call), token);
        taken = call.accept(token);
        ASSERT_EQ(taken, allowed) << prompt.text;
        if (!taken) break;
      }
      EXPECT_EQ(taken && call.completed(), fits(a, parameters["properties"]["a"]))
          << parameters << prompt.text;
    }
  }
}

// Some hundred times what they take: a test run shares its processors.
TEST(GrammarLengths, CostDoesNotGrowWithTheBound) {
  std::string text = "\"";
  while (text.size() < 4000)
    text += "The old king said \\\"good morning\\\" to all who came by.\\n";
  const auto ids = tokenizer().encode(text, text::SpecialTokens::kAsText);
  for (const int64_t most : {100, 10'000}) {
    auto begin = std::chrono::steady_clock::now();
    GrammarSession session = start(bounded(0, most));
    EXPECT_LT(seconds_since(begin), 2) << most;
    Words words(compiler().mask_words());
    int64_t count = 0;
    begin = std::chrono::steady_clock::now();
    for (const int32_t id : ids) {
      session.mask(words);
      if (!session.accept(id)) break;
      ++count;
    }
    EXPECT_LT(seconds_since(begin) / static_cast<double>(count), 2e-3) << most;
  }
  json properties = json::object();
  for (int i = 0; i < 200; ++i) properties[concat("key_", i)] = bounded(0, 100 + i);
  const auto begin = std::chrono::steady_clock::now();
  start(json{{"type", "object"}, {"properties", properties}});
  EXPECT_LT(seconds_since(begin), 30);
}

TEST(GrammarLengths, CompilingStopsWhenNobodyWaits) {
  // No part ends where another one goes on, so that these are unrolled: half a minute.
  json properties = json::object();
  for (int i = 0; i < 300; ++i) {
    properties[concat("key_", i)] = {{"type", "string"},
                                     {"pattern", concat("^(a|[a-z](b|", i, "c)?){1,128}$")}};
  }
  const std::string schema = json{{"type", "object"}, {"properties", properties}}.dump();
  const auto begin = std::chrono::steady_clock::now();
  {
    GrammarCompiler hasty(tokenizer(), 0, {.time = std::chrono::milliseconds(50)});
    for (int i = 0; i < 2; ++i) {
      try {
        hasty.compile({Kind::kJsonSchema, schema});
        ADD_FAILURE();
      } catch (const InputError& error) {
        EXPECT_NE(std::string_view(error.what()).find("more than 50 ms"), std::string_view::npos);
      }
    }
  }
  EXPECT_LT(seconds_since(begin), 10);
}

}  // namespace
}  // namespace hadal::engine_core
