// Whatever shape complete calls have, all of them are delivered, and what is incomplete is flagged:
// in whole and at every cut.
#include "text/irregular_calls.h"

#include <cstdlib>

#include <gtest/gtest.h>

#include "text/completion_check.h"

namespace hadal::text {
namespace {

/// Reads the completion cut at every place and in small pieces; all must give what it names.
void expect_delivered(const IrregularCompletion& shape, bool every_cut) {
  const Completion whole = parse_completion(shape.text, ThinkingMode::kThinking);
  ASSERT_EQ(whole.tool_calls, shape.calls) << shape.text << "\n" << whole.error;
  ASSERT_EQ(whole.reasoning, shape.reasoning) << shape.text;
  ASSERT_EQ(whole.content, shape.content) << shape.text;
  ASSERT_EQ(whole.lost, shape.lost) << shape.text << "\n" << whole.error;
  std::vector<size_t> every;
  for (size_t cut = 1; cut < shape.text.size(); ++cut) every.push_back(cut);
  ASSERT_EQ(check_cutting(shape.text, ThinkingMode::kThinking, every, whole), "") << shape.text;
  if (!every_cut) return;
  for (size_t cut = 1; cut < shape.text.size(); ++cut)
    ASSERT_EQ(check_cutting(shape.text, ThinkingMode::kThinking, {cut}, whole), "") << shape.text;
}

// With HADAL_EVERY_CUT=1 each shape is also cut at every single place; else an eighth of them,
// among which every two properties come in all combinations.
TEST(IrregularCalls, AllOfThe512ShapesAreDelivered) {
  const bool all_cuts = std::getenv("HADAL_EVERY_CUT") != nullptr;
  int flagged = 0;
  for (int bits = 0; bits < 512; ++bits) {
    IrregularShape shape = IrregularShape::of(bits);
    for (shape.which_bad = 0; shape.which_bad < IrregularShape::kBad; ++shape.which_bad) {
      const IrregularCompletion written = write_irregular(shape);
      const bool chosen = shape.which_bad == 0 && bits % 8 == (bits / 8 + bits / 64) % 8;
      expect_delivered(written, all_cuts || chosen);
      if (HasFatalFailure()) return;
      flagged += written.lost ? 1 : 0;
      if (!shape.bad_sibling) break;
    }
  }
  EXPECT_EQ(flagged, 256 * IrregularShape::kBad);
}

TEST(IrregularCalls, OthersAreDelivered) {
  std::mt19937 random(5);
  for (int round = 0; round < 1000; ++round) {
    IrregularShape shape = IrregularShape::of(static_cast<int>(random() % 512));
    shape.which_bad = static_cast<int>(random() % IrregularShape::kBad);
    shape.other_order = random() % 2 == 0;
    shape.single_quotes = random() % 3 == 0;
    shape.marks_missing = random() % 4 == 0;
    shape.text_between = random() % 4 == 0;
    if (shape.text_between && shape.bad_sibling) shape.bad_sibling = false;
    expect_delivered(write_irregular(shape, random() % 2 == 0 ? "Text </b> \n\n." : "x"),
                     round % 50 == 0);
    if (HasFatalFailure()) return;
  }
}

TEST(IrregularCalls, TheRegularShapeIsWellFormed) {
  const Completion whole =
      parse_completion(write_irregular(IrregularShape()).text, ThinkingMode::kThinking);
  EXPECT_TRUE(whole.ok) << whole.error;
  for (int bit = 0; bit < 9; ++bit) {
    const Completion read = parse_completion(write_irregular(IrregularShape::of(1 << bit)).text,
                                             ThinkingMode::kThinking);
    EXPECT_FALSE(read.ok) << bit;
    EXPECT_FALSE(read.error.empty()) << bit;
  }
}

/// What one parameter becomes, with and without a schema.
std::string value_of(const std::string& schema, const char* mark, const std::string& value) {
  ToolSchemas tools;
  if (!schema.empty())
    tools = ToolSchemas(
        PyJson::parse(concat(R"([{"function": {"name": "f", "parameters": {"properties": {"a": )",
                             schema, "}}}}]"),
                      "tools"));
  return tools.value("f", "a", value, std::string(mark) == "true");
}

TEST(CallValues, TheMarkIsTrustedAndTheRestIsJson) {
  const std::string integer = R"({"type": "integer"})", boolean = R"({"type": "boolean"})";
  const std::string either = R"({"type": ["string", "integer"]})";
  struct Case {
    std::string schema;
    const char *mark, *value, *json;
  };
  for (const Case& c : std::vector<Case>{
           {"", "true", "50", "\"50\""},
           {integer, "true", "50", "50"},
           {integer, "true", "050", "\"050\""},
           {integer, "true", "50.5", "\"50.5\""},
           {integer, "true", " 50", "\" 50\""},
           {boolean, "true", "true", "true"},
           {boolean, "true", "True", "\"True\""},
           {either, "true", "007", "\"007\""},
           {either, "true", "7", "\"7\""},
           {R"({"anyOf": [{"type": "string"}, {"type": "null"}]})", "true", "null", "\"null\""},
           {R"({"anyOf": [{"type": "integer"}, {"type": "null"}]})", "true", "null", "null"},
           {R"({"type": "array", "items": {}})", "true", "[1,2]", "[1, 2]"},
           {R"({"type": "object"})", "true", "{\"b\":1}", "{\"b\": 1}"},
           {R"({"enum": [1, 2]})", "true", "2", "2"},
           {R"({"enum": ["1", "2"]})", "true", "2", "\"2\""},
           {R"({"type": "string"})", "true", " a ", "\" a \""},
           {"", "false", "five", "\"five\""},
           {integer, "false", "five", "\"five\""},
           {boolean, "false", "True", "\"True\""},
           {"", "false", "NaN", "\"NaN\""},
           {"", "false", "1.50", "1.5"},
           {"", "false", "", "\"\""},
           {"", "false", "[1, {\"a\": null}]", "[1, {\"a\": null}]"},
           {"", "false", "1, \"b\": 2", "\"1, \\\"b\\\": 2\""},
       })
    EXPECT_EQ(value_of(c.schema, c.mark, c.value), c.json) << c.schema << c.mark << c.value;
}

/// The arguments of a call of `f` with these parameters, whole and cut everywhere.
std::string arguments_of(const std::string& parameters_schema, const std::string& parameters) {
  const auto tools = std::make_shared<const ToolSchemas>(PyJson::parse(
      concat(R"([{"function": {"name": "f", "parameters": )", parameters_schema, "}}]"), "tools"));
  const std::string text = concat(tool_block_start(), ">\n", dsml::kInvoke, " name=\"f\">\n",
                                  parameters, "\n", dsml::kInvokeEnd, ">\n", dsml::kBlockEnd, kEos);
  std::string found;
  for (size_t stride = 1; stride < 5; ++stride) {
    for (const size_t hold : {size_t{0}, size_t{1024}}) {
      CompletionParser parser(ThinkingMode::kChat, {.tools = tools, .hold_bytes = hold});
      EventSums sums;
      const auto take = [&](const std::vector<CompletionEvent>& events) {
        for (const CompletionEvent& event : events) sums.add(event);
      };
      std::vector<size_t> cuts;
      for (size_t cut = stride; cut < text.size(); cut += stride) cuts.push_back(cut);
      push_cut(parser, text, cuts, take);
      std::vector<CompletionEvent> rest;
      const Completion completion = parser.finish(rest);
      EXPECT_TRUE(completion.ok) << completion.error;
      EXPECT_EQ(sums.error, "");
      EXPECT_EQ(sums.calls, completion.tool_calls);
      if (completion.tool_calls.size() != 1) return "no call";
      if (!found.empty()) {
        EXPECT_EQ(completion.tool_calls[0].arguments, found);
      }
      found = completion.tool_calls[0].arguments;
    }
  }
  return found;
}

TEST(CallValues, AWrapperOfAllParametersIsUnwrapped) {
  const auto one = [](const char* key, const char* mark, const std::string& value) {
    return concat(dsml::kParameter, " name=\"", key, "\" string=\"", mark, "\">", value, "<",
                  dsml::kParameterEnd, ">");
  };
  const std::string schema =
      R"({"type": "object", "properties": {"p": {"type": "string"}, "n": {"type": "integer"}},
      "required": ["p"]})";
  const std::string object = R"({"p": "x", "n": 1})";
  for (const char* key : {"arguments", "input"}) {
    for (const char* mark : {"true", "false"}) {
      EXPECT_EQ(arguments_of(schema, one(key, mark, object)), object);
      EXPECT_EQ(arguments_of(schema, one(key, mark, R"({"p":"x","n":1})")), object);
    }
    // Not an object that fits, not alone, or a parameter of the tool.
    EXPECT_EQ(arguments_of(schema, one(key, "false", R"({"n": 1})")),
              concat("{\"", key, R"(": {"n": 1}})"));
    EXPECT_EQ(arguments_of(schema, one(key, "false", R"({"p": "x", "z": 1})")),
              concat("{\"", key, R"(": {"p": "x", "z": 1}})"));
    EXPECT_EQ(arguments_of(schema, one(key, "true", "ls")), concat("{\"", key, "\": \"ls\"}"));
    EXPECT_EQ(arguments_of(schema, concat(one(key, "false", object), "\n", one("p", "true", "y"))),
              concat("{\"", key, "\": ", object, ", \"p\": \"y\"}"));
    const std::string own =
        concat(R"({"properties": {")", key, R"(": {"type": "object"}, "p": {}}})");
    EXPECT_EQ(arguments_of(own, one(key, "false", object)),
              concat("{\"", key, "\": ", object, "}"));
  }
  EXPECT_EQ(arguments_of(schema, one("p", "true", object)),
            concat("{\"p\": ", quote_json(object), "}"));
}

}  // namespace
}  // namespace hadal::text
