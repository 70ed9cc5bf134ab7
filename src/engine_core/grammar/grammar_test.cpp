#include "engine_core/grammar/grammar.h"

#include <algorithm>
#include <functional>
#include <optional>
#include <random>
#include <regex>
#include <set>
#include <thread>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "engine_core/grammar/grammar_marker.h"
#include "testing/nano_grammar.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace hadal::engine_core {
namespace {

using nlohmann::json;

using testing::nano_compiler;
using testing::nano_tokenizer;
int64_t eos() { return nano_tokenizer().id_of(text::kEos); }

GrammarSession start(Grammar::Kind kind, const std::string& text, bool thinking = false) {
  return GrammarSession(nano_compiler().compile({kind, text}), thinking);
}

bool bit(const std::vector<uint32_t>& words, int64_t token) {
  const auto place = static_cast<size_t>(token);
  return (words[place / 32] >> place % 32 & 1u) != 0;
}

std::vector<uint32_t> mask_of(GrammarSession& session) {
  std::vector<uint32_t> words(nano_compiler().mask_words());
  session.mask(words);
  return words;
}

class Random {
 public:
  /// --gtest_random_seed=N brings other draws.
  explicit Random(uint64_t seed)
      : engine_(seed + 1000 * static_cast<uint64_t>(GTEST_FLAG_GET(random_seed))) {}
  int64_t below(int64_t count) {
    return static_cast<int64_t>(engine_() % static_cast<uint64_t>(count));
  }
  bool chance(double share) { return static_cast<double>(below(1'000'000)) < share * 1e6; }

 private:
  std::mt19937_64 engine_;
};

/// A token that the mask allows: often one that ends something, so that walks end.
int64_t pick(const std::vector<uint32_t>& words, Random& random) {
  static const std::vector<int64_t> closers = [] {
    std::vector<int64_t> ids;
    for (const char* text : {"\"", "}", "]", ",", "\"}", "</", "\uff5cDSML\uff5c"}) {
      if (const auto id = nano_tokenizer().find(text)) ids.push_back(*id);
    }
    return ids;
  }();
  if (bit(words, eos()) && random.chance(0.3)) return eos();
  if (random.chance(0.3)) {
    const int64_t token = closers[static_cast<size_t>(random.below(std::ssize(closers)))];
    if (bit(words, token)) return token;
  }
  const int64_t size = nano_tokenizer().vocab_size();
  for (int tries = 0; tries < 30; ++tries) {
    const int64_t token = random.below(size);
    if (bit(words, token)) return token;
  }
  const int64_t first = random.below(size);
  for (int64_t i = 0; i < size; ++i) {
    if (bit(words, (first + i) % size)) return (first + i) % size;
  }
  return -1;
}

/// Draws allowed tokens until EOS; "" if it does not come within `most`. On the way: EOS is allowed
/// exactly where the text is complete, and what was tried and taken back leaves no trace.
std::string walk(GrammarSession& session, Random& random, int most = 400) {
  std::string text;
  for (int step = 0; step < most; ++step) {
    const std::vector<uint32_t> words = mask_of(session);
    EXPECT_EQ(bit(words, eos()), session.completed()) << text;
    if (random.chance(0.1)) {
      const int64_t before = session.length();
      std::vector<uint32_t> ahead = words;
      for (int64_t count = random.below(5); count >= 0; --count) {
        const int64_t token = pick(ahead, random);
        if (!session.accept(token)) ADD_FAILURE() << text << " then " << token;
        ahead = mask_of(session);
      }
      session.rollback(session.length() - before);
      EXPECT_EQ(mask_of(session), words) << text;
    }
    const int64_t any = random.below(nano_tokenizer().vocab_size());
    if (!bit(words, any) && session.accept(any)) ADD_FAILURE() << text << " then " << any;
    const int64_t token = pick(words, random);
    if (token < 0) {
      ADD_FAILURE() << "nothing may follow " << text;
      return "";
    }
    if (!session.accept(token)) ADD_FAILURE() << text << " then " << token;
    if (token == eos()) {
      EXPECT_TRUE(session.completed());
      EXPECT_EQ(text::valid_utf8_prefix(text), text.size()) << text;
      return text;
    }
    text += nano_tokenizer().token_bytes(static_cast<int32_t>(token));
  }
  return "";
}

/// The value of JSON text; discarded if it is none, nothing if a number is too large for a double.
std::optional<json> read_json(const std::string& text) {
  try {
    return json::parse(text);
  } catch (const json::out_of_range&) {
    return std::nullopt;
  } catch (const json::parse_error&) {
    return json(json::value_t::discarded);
  }
}

int64_t characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; });
}

/// What the generator below uses of JSON schema.
bool validates(const json& value, const json& schema, const json& root) {
  if (schema.contains("$ref")) {
    return validates(value, root["$defs"][schema["$ref"].get<std::string>().substr(8)], root);
  }
  if (schema.contains("anyOf")) {
    return std::any_of(schema["anyOf"].begin(), schema["anyOf"].end(),
                       [&](const json& option) { return validates(value, option, root); });
  }
  if (schema.contains("enum")) {
    return std::find(schema["enum"].begin(), schema["enum"].end(), value) != schema["enum"].end();
  }
  if (schema.contains("const")) return value == schema["const"];
  const auto type = schema.value("type", "");
  if (type == "null") return value.is_null();
  if (type == "boolean") return value.is_boolean();
  if (type == "integer" || type == "number") {
    if (type == "integer" ? !value.is_number_integer() : !value.is_number()) return false;
    return value >= schema.value("minimum", json(-1e300)) &&
           value <= schema.value("maximum", json(1e300));
  }
  if (type == "string") {
    if (!value.is_string()) return false;
    const auto text = value.get<std::string>();
    if (schema.contains("pattern")) {
      return std::regex_search(text, std::regex(schema["pattern"].get<std::string>()));
    }
    return characters(text) >= schema.value("minLength", int64_t{0}) &&
           characters(text) <= schema.value("maxLength", int64_t{1} << 40);
  }
  if (type == "array") {
    if (!value.is_array()) return false;
    const auto size = std::ssize(value);
    return size >= schema.value("minItems", int64_t{0}) &&
           size <= schema.value("maxItems", int64_t{1} << 40) &&
           std::all_of(value.begin(), value.end(), [&](const json& element) {
             return validates(element, schema["items"], root);
           });
  }
  if (type != "object" || !value.is_object()) return false;
  for (const auto& name : schema.value("required", json::array())) {
    if (!value.contains(name.get<std::string>())) return false;
  }
  for (const auto& [name, member] : value.items()) {
    if (!schema["properties"].contains(name)) return false;
    if (!validates(member, schema["properties"][name], root)) return false;
  }
  return true;
}

json random_schema(Random& random, int depth) {
  switch (random.below(depth > 0 ? 11 : 7)) {
    case 0:
      return {{"type", "boolean"}};
    case 1: {
      const int64_t least = random.below(200) - 100;
      return {{"type", "integer"}, {"minimum", least}, {"maximum", least + random.below(300)}};
    }
    case 2: {
      const int64_t least = random.below(4);
      return {{"type", "string"}, {"minLength", least}, {"maxLength", least + random.below(12)}};
    }
    case 3:
      return {{"enum", {"red", "gr\u00fcn", 3, nullptr, "\U0001F600 \"quoted\""}}};
    case 4:
      return {{"const", {{"fixed", {1, 2}}}}};
    case 5:
      return {{"type", "string"}, {"pattern", "^[a-c]{2,4}(-[0-9]{1,3})?$"}};
    case 6:
      return random.chance(0.5) ? json{{"type", "null"}} : json{{"$ref", "#/$defs/point"}};
    case 7: {
      const int64_t least = random.below(3);
      return {{"type", "array"},
              {"items", random_schema(random, depth - 1)},
              {"minItems", least},
              {"maxItems", least + random.below(3)}};
    }
    case 8:
      return {{"anyOf", {random_schema(random, depth - 1), random_schema(random, depth - 1)}}};
    default: {
      json properties = json::object(), required = json::array();
      const int64_t count = random.below(5);
      for (int64_t i = 0; i < count; ++i) {
        const std::string name = concat(i % 2 == 0 ? "key_" : "\u00e4 ", i);
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

json with_point(json schema) {
  schema["$defs"]["point"] = {
      {"type", "object"},
      {"properties", {{"x", {{"type", "integer"}, {"minimum", 0}, {"maximum", 9}}}}},
      {"required", {"x"}},
      {"additionalProperties", false}};
  return schema;
}

TEST(Grammar, WalksOfRandomSchemasValidate) {
  Random random(1);
  int ended = 0;
  constexpr int kSchemas = 50, kWalks = 3;
  for (int round = 0; round < kSchemas; ++round) {
    const json schema = with_point(random_schema(random, 3));
    for (int i = 0; i < kWalks; ++i) {
      const bool thinking = i == 2;
      GrammarSession session = start(Grammar::Kind::kJsonSchema, schema.dump(), thinking);
      if (thinking) {
        ASSERT_TRUE(session.accept(nano_tokenizer().id_of(text::kThinkEnd)));
      }
      const std::string text = walk(session, random);
      if (text.empty()) continue;
      ++ended;
      const json value = json::parse(text, nullptr, false);
      ASSERT_FALSE(value.is_discarded()) << text << "\n" << schema;
      ASSERT_TRUE(validates(value, schema, schema)) << text << "\n" << schema;
    }
  }
  EXPECT_GE(ended, kSchemas * kWalks * 95 / 100);
}

TEST(Grammar, JsonObject) {
  Random random(2);
  int ended = 0;
  for (int round = 0; round < 20; ++round) {
    GrammarSession session = start(Grammar::Kind::kJsonObject, "");
    const std::string text = walk(session, random);
    if (text.empty()) continue;
    ++ended;
    const std::optional<json> value = read_json(text);
    EXPECT_TRUE(!value.has_value() || value->is_object()) << text;
  }
  EXPECT_GE(ended, 10);
}

TEST(Grammar, RegexAcrossCharactersAndTokens) {
  Random random(3);
  for (int round = 0; round < 20; ++round) {
    GrammarSession session = start(Grammar::Kind::kRegex, "[\u00e4\u20ac\U0001F600]{3}-(on|off)");
    const std::string text = walk(session, random);
    ASSERT_EQ(text::valid_utf8_prefix(text), text.size());
    ASSERT_TRUE(text.ends_with("-on") || text.ends_with("-off")) << text;
    ASSERT_EQ(characters(text.substr(0, text.find('-'))), 3) << text;
  }
}

/// A random expression with the language it stands for: from where in a text it leads to where.
struct Expression {
  using Places = std::set<size_t>;
  std::string pattern;
  std::function<Places(const std::string&, const Places&)> follow;
};

Expression random_expression(Random& random, int depth) {
  using Places = Expression::Places;
  const int64_t kind = random.below(depth > 0 ? 8 : 3);
  if (kind < 3) {
    const std::string letters = kind == 0 ? "a" : kind == 1 ? "b" : "ab";
    return {concat("[", letters, "]"), [letters](const std::string& text, const Places& from) {
              Places to;
              for (const size_t pos : from) {
                if (pos < text.size() && letters.find(text[pos]) != std::string::npos) {
                  to.insert(pos + 1);
                }
              }
              return to;
            }};
  }
  const Expression first = random_expression(random, depth - 1);
  if (kind == 3 || kind == 4) {
    const Expression second = random_expression(random, depth - 1);
    if (kind == 3) {
      return {first.pattern + second.pattern, [=](const std::string& text, const Places& from) {
                return second.follow(text, first.follow(text, from));
              }};
    }
    return {concat("(", first.pattern, "|", second.pattern, ")"),
            [=](const std::string& text, const Places& from) {
              Places to = first.follow(text, from);
              to.merge(second.follow(text, from));
              return to;
            }};
  }
  struct Count {
    const char* text;
    int least, most;
  };
  static const std::vector<Count> counts = {{"?", 0, 1},    {"*", 0, 10},    {"+", 1, 10},
                                            {"{2}", 2, 2},  {"{1,3}", 1, 3}, {"{0,2}", 0, 2},
                                            {"{2,}", 2, 10}};
  const Count count = counts[static_cast<size_t>(random.below(std::ssize(counts)))];
  return {concat("(", first.pattern, ")", count.text),
          [=](const std::string& text, const Places& from) {
            Places now = from, to;
            for (int times = 0; times <= count.most && !now.empty(); ++times) {
              if (times >= count.least) to.insert(now.begin(), now.end());
              now = first.follow(text, now);
            }
            return to;
          }};
}

// Random expressions over two letters, all words of up to 6, as texts and as patterns of a schema.
TEST(Grammar, ExpressionsMatchTheirLanguage) {
  Random random(6);
  for (int round = 0; round < 60; ++round) {
    const Expression expression = random_expression(random, 4);
    const std::string& pattern = expression.pattern;
    const json schema = {{"type", "string"}, {"pattern", concat("^", pattern, "$")}};
    for (const bool quoted : {false, true}) {
      GrammarSession session = quoted ? start(Grammar::Kind::kJsonSchema, schema.dump())
                                      : start(Grammar::Kind::kRegex, pattern);
      for (int length = 0; length <= 6; ++length) {
        for (int word = 0; word < 1 << length; ++word) {
          std::string text;
          for (int i = 0; i < length; ++i) text += (word >> i & 1) != 0 ? 'a' : 'b';
          const std::string written = quoted ? "\"" + text + "\"" : text;
          bool accepted = true;
          for (const char c : written) {
            accepted = accepted && session.accept(nano_tokenizer().id_of(std::string_view(&c, 1)));
          }
          accepted = accepted && session.completed();
          session.rollback(session.length());
          ASSERT_EQ(accepted, expression.follow(text, {0}).contains(text.size()))
              << pattern << (quoted ? " quoted " : " ") << text;
        }
      }
    }
  }
}

TEST(Grammar, Ebnf) {
  Random random(4);
  for (int round = 0; round < 20; ++round) {
    GrammarSession session =
        start(Grammar::Kind::kEbnf,
              "root ::= sum\nsum ::= term (\"+\" term)?\nterm ::= [0-9] | \"(\" sum \")\"\n");
    const std::string text = walk(session, random);
    if (text.empty()) continue;
    ASSERT_EQ(text.find_first_not_of("0123456789+()"), std::string::npos) << text;
    ASSERT_EQ(std::count(text.begin(), text.end(), '('), std::count(text.begin(), text.end(), ')'));
  }
}

/// accept() against mask() for every token.
void expect_mask_is_acceptance(GrammarSession& session) {
  const std::vector<uint32_t> words = mask_of(session);
  for (int64_t token = 0; token < nano_tokenizer().vocab_size(); ++token) {
    const bool accepted = session.accept(token);
    ASSERT_EQ(accepted, bit(words, token)) << token;
    if (accepted) session.rollback(1);
  }
}

TEST(Grammar, BeginsBehindTheThinking) {
  // Its own token ends the thinking; text that looks like it does not.
  GrammarSession session =
      start(Grammar::Kind::kJsonSchema,
            R"({"type":"object","properties":{"answer":{"type":"boolean"}},"required":["answer"]})",
            true);
  const auto spell = [&](std::string_view text) {
    for (const char c : text) {
      ASSERT_TRUE(session.accept(nano_tokenizer().id_of(std::string_view(&c, 1)))) << c;
    }
  };
  EXPECT_FALSE(session.completed());
  EXPECT_FALSE(bit(mask_of(session), eos()));
  expect_mask_is_acceptance(session);
  spell("so: <</think>X");
  expect_mask_is_acceptance(session);
  const int64_t before = session.length();
  ASSERT_TRUE(session.accept(nano_tokenizer().id_of(text::kThinkEnd)));
  expect_mask_is_acceptance(session);
  spell("{\"answer\": true}");
  EXPECT_TRUE(session.completed());
  EXPECT_TRUE(session.accept(eos()));
  EXPECT_EQ(mask_of(session)[static_cast<size_t>(eos()) / 32], 1u << eos() % 32);
  EXPECT_FALSE(session.accept(eos() + 1));
  EXPECT_TRUE(session.accept(eos()));
  session.rollback(session.length() - before);
  expect_mask_is_acceptance(session);
  spell("X");
  EXPECT_FALSE(session.completed());
  session.rollback(session.length());
  EXPECT_THROW(session.rollback(1), Error);
}

const char kTools[] = R"([
  {"name": "weather", "strict": true, "parameters": {"type": "object", "properties": {
     "city": {"type": "string", "maxLength": 12, "minLength": 1},
     "unit": {"enum": ["C", "F"]},
     "days": {"type": "integer", "minimum": 1, "maximum": 14},
     "spot": {"$ref": "#/$defs/spot"},
     "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}},
     "required": ["city", "days"], "additionalProperties": false,
     "$defs": {"spot": {"type": "object", "required": ["x"], "additionalProperties": false,
                        "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 9}}}}}},
  {"name": "now", "strict": true, "parameters": {"type": "object", "properties": {}}},
  {"name": "free", "parameters": {"type": "object", "properties": {"q": {"type": "string"}}}}])";

void expect_call_is_valid(const text::ToolCall& call) {
  const std::optional<json> read = read_json(call.arguments);
  if (!read.has_value()) return;
  const json& value = *read;
  ASSERT_TRUE(value.is_object()) << call.name << call.arguments;
  if (call.name == "now") {
    EXPECT_TRUE(value.empty()) << call.arguments;
  }
  if (call.name != "weather") return;
  json schema = json::parse(kTools)[0]["parameters"];
  EXPECT_TRUE(validates(value, schema, schema)) << call.arguments;
}

TEST(Grammar, ToolCallsAreWhatTheParserReads) {
  Random random(5);
  int ended = 0, weather = 0;
  for (int round = 0; round < 120; ++round) {
    const bool parallel = round % 2 == 0;
    const std::string text =
        parallel ? kTools : concat(R"({"parallel": false, "tools": )", kTools, "}");
    GrammarSession session = start(Grammar::Kind::kToolCalls, text);
    // Half of the walks begin inside a call of the strict tool.
    std::string begun;
    if (round % 4 < 2) {
      begun = "\n\n<\uff5cDSML\uff5ctool_calls>\n<\uff5cDSML\uff5cinvoke name=\"weather\">\n";
      for (const int32_t id : nano_tokenizer().encode(begun, text::SpecialTokens::kRecognise)) {
        ASSERT_TRUE(session.accept(id));
      }
    }
    std::string answer = walk(session, random, 600);
    if (answer.empty()) continue;
    answer.insert(0, begun);
    const text::Completion completion =
        text::parse_completion(answer + std::string(text::kEos), text::ThinkingMode::kChat);
    // Names of free parameters may repeat, as they may without a grammar.
    if (!completion.ok && completion.error == "a parameter is malformed or repeated" &&
        answer.find("name=\"free\"") != std::string::npos) {
      continue;
    }
    ASSERT_TRUE(completion.ok) << completion.error << "\n" << answer;
    ++ended;
    EXPECT_EQ(completion.content, "");
    EXPECT_GE(completion.tool_calls.size(), 1u);
    if (!parallel) {
      EXPECT_EQ(completion.tool_calls.size(), 1u);
    }
    for (const text::ToolCall& call : completion.tool_calls) {
      weather += call.name == "weather";
      expect_call_is_valid(call);
    }
  }
  EXPECT_GE(ended, 30);
  EXPECT_GE(weather, 5);
}

TEST(Grammar, ToolCallsThatWeWriteAreAccepted) {
  const std::vector<text::ToolCall> calls = {
      {"weather", R"({"city": "K\u00f6ln", "unit": "C", "days": 3, "spot": {"x": 4}})"},
      {"free", R"({"q": "a < b\nnext", "n": [1, 2]})"}};
  const std::string block = "\n\n" + text::write_tool_calls(calls);
  for (const bool plain : {false, true}) {
    GrammarSession session =
        start(Grammar::Kind::kToolCalls,
              plain ? concat(R"({"mode": "auto", "tools": )", kTools, "}") : kTools);
    EXPECT_EQ(session.completed(), plain);
    const std::string text = plain ? "Let me see.\n\nFirst <b>" + block : block;
    for (const int32_t id : nano_tokenizer().encode(text, text::SpecialTokens::kRecognise)) {
      ASSERT_TRUE(session.accept(id))
          << nano_tokenizer().token_bytes(id) << " after " << session.length();
    }
    EXPECT_TRUE(session.completed());
    const std::vector<uint32_t> words = mask_of(session);
    EXPECT_TRUE(bit(words, eos()));
    EXPECT_FALSE(bit(words, nano_tokenizer().id_of("a")));
  }
  // Arguments outside the schema.
  GrammarSession session = start(Grammar::Kind::kToolCalls, kTools);
  const std::vector<text::ToolCall> wrong = {{"weather", R"({"city": "K", "days": 15})"}};
  bool accepted = true;
  for (const int32_t id : nano_tokenizer().encode("\n\n" + text::write_tool_calls(wrong),
                                                  text::SpecialTokens::kRecognise)) {
    accepted = accepted && session.accept(id);
  }
  EXPECT_FALSE(accepted);
}

TEST(Grammar, TheMarkerBeginsABlockOrDoesNotCome) {
  const std::string tools = concat(R"({"mode": "auto", "tools": )", kTools, "}");
  ASSERT_TRUE(text::tool_block_start().starts_with(concat(kBlockBegin, text::kDsml)));
  const int64_t marker = nano_tokenizer().id_of(text::kDsml);
  // Spelled byte by byte, or as its own token: whether all of it is accepted.
  const auto takes = [&](GrammarSession& session, std::string_view text, bool as_token) {
    const int64_t before = session.length();
    expect_mask_is_acceptance(session);
    bool all = true;
    for (size_t pos = 0; pos < text.size() && all; ++pos) {
      const bool is_marker = as_token && text.substr(pos).starts_with(text::kDsml);
      const int64_t token = is_marker ? marker : nano_tokenizer().id_of(text.substr(pos, 1));
      const bool allowed = bit(mask_of(session), token);
      all = session.accept(token);
      EXPECT_EQ(allowed, all) << text << " at " << pos;
      if (is_marker) pos += text::kDsml.size() - 1;
    }
    if (all) expect_mask_is_acceptance(session);
    session.rollback(session.length() - before);
    return all;
  };
  for (const bool thinking : {false, true}) {
    GrammarSession session = start(Grammar::Kind::kToolCalls, tools, thinking);
    if (thinking) {
      EXPECT_FALSE(session.accept(marker));
      ASSERT_TRUE(session.accept(nano_tokenizer().id_of(text::kThinkEnd)));
    }
    // Spelled by ordinary tokens it is text, wherever it stands.
    for (const bool as_token : {false, true}) {
      const std::string_view open = text::tool_block_start();  // "\n\n<|DSML|tool_calls"
      EXPECT_TRUE(takes(session, open, as_token));
      EXPECT_TRUE(takes(session, concat("a\n\n", open), as_token));
      EXPECT_TRUE(takes(session, concat(open.substr(0, 7), "\n<", open.substr(0, 3), "b"), false));
      EXPECT_EQ(takes(session, open.substr(1), as_token), !as_token);
      EXPECT_EQ(takes(session, open.substr(3), as_token), !as_token);
      EXPECT_EQ(takes(session, concat("a\n<", text::kDsml, "parameter"), as_token), !as_token);
      EXPECT_EQ(takes(session, concat("\n\n<", text::kDsml, "invoke"), as_token), !as_token);
      EXPECT_EQ(takes(session, concat("\uff5c\uff5cDSM", text::kDsml), as_token), !as_token);
    }
    EXPECT_TRUE(takes(session, "\uff5cDSML \n\n<div> \uff5cDSML\uff5d", false));
  }
}

TEST(Grammar, AddedTokensAreNoText) {
  GrammarSession session = start(Grammar::Kind::kRegex, "(.|\\n)*");
  std::vector<uint32_t> words = mask_of(session);
  for (int32_t id = 0; id < nano_tokenizer().vocab_size(); ++id) {
    if (nano_tokenizer().is_added(id)) {
      EXPECT_EQ(bit(words, id), id == eos()) << nano_tokenizer().token_bytes(id);
    }
  }
  EXPECT_TRUE(bit(words, nano_tokenizer().id_of("a")));
}

TEST(Grammar, RefusesWhatItCannotKeep) {
  using Kind = Grammar::Kind;
  const auto message = [](Kind kind, const std::string& text) -> std::string {
    try {
      nano_compiler().compile({kind, text});
    } catch (const InputError& error) {
      return error.what();
    }
    return "accepted";
  };
  const std::string nested = std::string(5000, '(') + "a" + std::string(5000, ')');
  const std::vector<std::tuple<Kind, std::string, std::string>> cases = {
      {Kind::kJsonSchema, "{", "JSON schema"},
      {Kind::kJsonSchema, "[]", "JSON schema"},
      {Kind::kJsonSchema, R"({"type": "banana"})", "banana"},
      {Kind::kJsonSchema, R"({"type": "array", "uniqueItems": true})", "uniqueItems"},
      {Kind::kJsonSchema, R"({"not": {"type": "null"}})", "not"},
      {Kind::kJsonSchema, R"({"type": "string", "maxLength": 1000000000})", "maxLength"},
      {Kind::kJsonSchema, R"({"$ref": "#/$defs/none"})", "none"},
      {Kind::kJsonSchema, R"({"type": "string", "pattern": "(a"})", "JSON schema"},
      {Kind::kJsonSchema, R"({"maxLength": 2})", "maxLength without type"},
      {Kind::kJsonSchema, R"({"items": {"minimum": 2}})", "items: minimum without type"},
      {Kind::kJsonSchema, R"({"patternProperties": {"a": {}}})", "without type"},
      {Kind::kJsonSchema, R"({"anyOf": [{"type": "null"}], "required": ["a"]})", "required beside"},
      {Kind::kJsonSchema, R"({"type": "object", "properties": {"not": {"type": "string", "pattern":
        "((a", "minLength": 2}}})",
       "JSON schema"},
      {Kind::kRegex, "(a", "regular expression"},
      {Kind::kRegex, "a(?=b)", "Lookahead"},
      {Kind::kRegex, nested, "nested"},
      {Kind::kRegex, "a{2,10000000}", "repetition"},
      {Kind::kEbnf, "root ::= missing", "missing"},
      {Kind::kEbnf, "root ::= (", "EBNF"},
      {Kind::kEbnf, "", "EBNF"},
      {Kind::kToolCalls, "[]", "list of tools"},
      {Kind::kToolCalls, R"([{"name": "a\"b"}])", "markup"},
      {Kind::kToolCalls, R"([{"name": "f", "strict": true, "parameters": {"anyOf": []}}])",
       "anyOf"},
      {Kind::kToolCalls, R"({"tools": [{"name": "f"}], "mode": "any"})", "mode"},
      {Kind::kRegex, std::string(300 << 10, 'a'), "bytes"},
  };
  for (const auto& [kind, text, expected] : cases) {
    EXPECT_NE(message(kind, text).find(expected), std::string::npos)
        << text.substr(0, 100) << ": " << message(kind, text);
  }
  EXPECT_EQ(nano_compiler().compile({}), nullptr);
}

/// Whether the text, written in any tokens, is a complete answer.
bool takes(Grammar::Kind kind, const std::string& grammar, const std::string& answer) {
  GrammarSession session = start(kind, grammar);
  for (const int32_t id : nano_tokenizer().encode(answer, text::SpecialTokens::kRecognise)) {
    if (!session.accept(id)) return false;
  }
  return session.completed();
}

TEST(Grammar, PatternsStayInsideTheirStrings) {
  using Kind = Grammar::Kind;
  struct Case {
    const char* pattern;
    std::vector<std::string> good, bad;
  };
  const std::vector<Case> cases = {
      {"^[^\u00e4]{3}$", {"abc", "a\u00f6c"}, {"a\"c", "a\nc", "a\\c", "a\u00e4c"}},
      {"^[\u00e4-\u00fc\U0001F600].$", {"\u00f6x", "\U0001F600x"}, {"ax", "\u00f6\"", "\u00f6\t"}},
      {"^\\S\u20ac.\\W$", {"a\u20acb-"}, {"a\u20acb\"", "a\u20ac\"-", "\"\u20acb-"}},
      {"^\u00fc{2,10000}$", {"\u00fc\u00fc"}, {"\u00fc"}},
  };
  for (const Case& one : cases) {
    const json schema = {{"type", "string"}, {"pattern", one.pattern}};
    const json named = {{"type", "object"}, {"patternProperties", {{one.pattern, json::object()}}}};
    for (const std::string& text : one.good) {
      EXPECT_TRUE(takes(Kind::kJsonSchema, schema.dump(), concat("\"", text, "\""))) << text;
      EXPECT_TRUE(takes(Kind::kJsonSchema, named.dump(), concat("{\"", text, "\": 1}"))) << text;
    }
    for (const std::string& text : one.bad) {
      EXPECT_FALSE(takes(Kind::kJsonSchema, schema.dump(), concat("\"", text, "\""))) << text;
      EXPECT_FALSE(takes(Kind::kJsonSchema, named.dump(), concat("{\"", text, "\": 1}"))) << text;
    }
  }
}

TEST(Grammar, CacheForgetsWhatIsOldest) {
  GrammarLimits limits;
  limits.cache_bytes = 200'000;
  GrammarCompiler small(nano_tokenizer(), 0, limits);
  const auto regex = [](int i) { return Grammar{Grammar::Kind::kRegex, concat("[a-z]{", i, "}")}; };
  const auto first = small.compile(regex(1));
  EXPECT_EQ(small.compile(regex(1)), first);
  EXPECT_EQ(small.stats().hits, 1);
  EXPECT_EQ(small.stats().misses, 1);
  for (int i = 2; i < 40; ++i) {
    small.compile(regex(i));
    EXPECT_LE(small.stats().bytes, limits.cache_bytes);
  }
  EXPECT_LT(small.stats().grammars, 39);
  EXPECT_NE(small.compile(regex(1)), first);
}

TEST(Grammar, CompilesFromManyThreads) {
  GrammarCompiler own(nano_tokenizer());
  std::vector<std::thread> threads;
  std::vector<std::shared_ptr<const CompiledGrammar>> results(8);
  for (size_t i = 0; i < results.size(); ++i) {
    threads.emplace_back([&, i] {
      results[i] = own.compile({Grammar::Kind::kRegex, concat("[a-f]+", i % 2)});
      GrammarSession session(results[i], false);
      std::vector<uint32_t> words(own.mask_words());
      EXPECT_TRUE(session.mask(words));
      EXPECT_TRUE(session.accept(nano_tokenizer().id_of("a")));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 2; i < results.size(); ++i) EXPECT_EQ(results[i], results[i % 2]);
  EXPECT_EQ(own.stats().grammars, 2);
}

TEST(Grammar, GivesUpAfterItsTime) {
  GrammarLimits limits;
  limits.time = std::chrono::milliseconds(0);
  GrammarCompiler hasty(nano_tokenizer(), 0, limits);
  json properties = json::object();
  for (int i = 0; i < 200; ++i) {
    properties[concat("key_", i)] = {{"type", "string"}, {"maxLength", 100}};
  }
  const json schema = {{"type", "object"}, {"properties", properties}};
  EXPECT_THROW(hasty.compile({Grammar::Kind::kJsonSchema, schema.dump()}), InputError);
}

TEST(Grammar, MasksThatTakeTooLongEndTheAnswer) {
  GrammarLimits limits;
  limits.masks = std::chrono::milliseconds(0);
  limits.mean_mask = std::chrono::milliseconds(0);
  GrammarCompiler strict(nano_tokenizer(), 0, limits);
  std::vector<uint32_t> words(strict.mask_words());
  GrammarSession session(strict.compile({Grammar::Kind::kRegex, "[a-z]+"}), false);
  try {
    session.mask(words);
    FAIL() << "no error";
  } catch (const InputError& error) {
    EXPECT_NE(std::string(error.what()).find("at most 0 ms are allowed"), std::string::npos)
        << error.what();
  }
  // A slow one among many quick ones is none: the average counts, and only behind the first two
  // seconds.
  GrammarSession usual(nano_compiler().compile({Grammar::Kind::kRegex, "[a-z]+"}), false);
  for (int i = 0; i < 100; ++i) EXPECT_TRUE(usual.mask(words));
}

}  // namespace
}  // namespace hadal::engine_core
