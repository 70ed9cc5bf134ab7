#include "text/tool_calls.h"

#include <algorithm>
#include <filesystem>

#include <gtest/gtest.h>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/tokenizer_file.h"

namespace hadal::text {
namespace {

constexpr auto kChat = ThinkingMode::kChat;
constexpr auto kThinking = ThinkingMode::kThinking;

/// '|' becomes U+FF5C and '$' the end-of-sentence token.
std::string wire(std::string_view text) {
  std::string out;
  for (const char c : text) {
    if (c == '|') {
      out += "\uff5c";
    } else if (c == '$') {
      out += kEos;
    } else {
      out += c;
    }
  }
  return out;
}

std::string block(std::string_view calls) {
  return wire(concat("\n\n<|DSML|tool_calls>\n", calls, "</|DSML|tool_calls>"));
}

const std::string kCall =
    "<|DSML|invoke name=\"f\">\n<|DSML|parameter name=\"a\" string=\"true\">x\n "
    "\"y\"</|DSML|parameter>\n"
    "<|DSML|parameter name=\"b\" string=\"false\">[1, {}]</|DSML|parameter>\n</|DSML|invoke>\n";

TEST(ToolCalls, WritesOneParameterAKey) {
  const ToolCall call{"f", R"({"a": "x\n \"y\"", "b": [1,{}]})"};
  EXPECT_EQ("\n\n" + write_tool_calls(std::vector{call}), block(kCall));
  EXPECT_EQ("\n\n" + write_tool_calls(std::vector{call, call}), block(kCall + kCall));
  EXPECT_EQ(
      write_tool_calls(std::vector{ToolCall{"g", "{}"}}),
      wire(
          "<|DSML|tool_calls>\n<|DSML|invoke name=\"g\">\n\n</|DSML|invoke>\n</|DSML|tool_calls>"));
  // What is no object becomes one string parameter.
  EXPECT_NE(
      write_tool_calls(std::vector{ToolCall{"g", "{not json"}})
          .find(wire(
              "<|DSML|parameter name=\"arguments\" string=\"true\">{not json</|DSML|parameter>")),
      std::string::npos);
  for (const char* other : {"7", "[1, 2]", "null", "\"x\"", ""}) {
    EXPECT_NE(write_tool_calls(std::vector{ToolCall{"g", other}})
                  .find(wire(concat("<|DSML|parameter name=\"arguments\" string=\"true\">", other,
                                    "</|DSML|parameter>"))),
              std::string::npos);
  }
  // Numbers are written as Python writes them.
  EXPECT_NE(write_tool_calls(std::vector{ToolCall{"g", R"({"n":1.50,"e":1e16,"t":true,"z":null})"}})
                .find(wire("string=\"false\">1.5</|DSML|parameter>")),
            std::string::npos);
}

TEST(ToolCalls, ReadsWhatItWrites) {
  const std::vector<ToolCall> calls = {
      {"f", R"({"a": "x\n \"y\" </b> \u00e9", "b": [1, {"c": null}], "": "", "n": 1.5})"},
      {"g \"quoted\"", "{}"}};
  const std::string text = concat("r</think>c\n\n", write_tool_calls(calls), kEos);
  const Completion completion = parse_completion(text, kThinking);
  ASSERT_TRUE(completion.ok) << completion.error;
  EXPECT_EQ(completion.reasoning, "r");
  EXPECT_EQ(completion.content, "c");
  ASSERT_EQ(completion.tool_calls.size(), 2u);
  EXPECT_EQ(completion.tool_calls[0].arguments, PyJson::parse(calls[0].arguments, "t").dump());
  EXPECT_EQ(completion.tool_calls[1], calls[1]);
  EXPECT_EQ(concat("\n\n", write_tool_calls(completion.tool_calls)),
            concat("\n\n", write_tool_calls(calls)));
}

TEST(ToolCalls, ResultIsInOpenAiForm) {
  const Completion completion = parse_completion("hi" + block(kCall), kChat);
  ASSERT_TRUE(completion.ok) << completion.error;
  EXPECT_EQ(completion.to_json().dump(),
            R"({"role": "assistant", "content": "hi", "reasoning_content": "", )"
            R"("tool_calls": [{"type": "function", )"
            R"("function": {"name": "f", )"
            R"("arguments": "{\"a\": \"x\\n \\\"y\\\"\", \"b\": [1, {}]}"}}]})");
}

TEST(ToolCalls, OfficialTurnsParseBack) {
  const std::string folder = HADAL_SOURCE_DIR "/../shared/data/dsv4-encoding-tests/";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "absent: " << folder;
  int turns = 0;
  for (int i = 1; i <= 4; ++i) {
    const PyJson messages = messages_of_request(
        PyJson::parse(read_file(concat(folder, "test_input_", i, ".json")), "in"));
    const std::string prompt = read_file(concat(folder, "test_output_", i, ".txt"));
    // An answer that opens with <think> is read in thinking mode up to its end-of-sentence token.
    const std::string opener = concat(kAssistant, kThinkStart);
    for (size_t pos = prompt.find(opener); pos != std::string::npos;
         pos = prompt.find(opener, pos + 1)) {
      const size_t begin = pos + opener.size();
      const std::string turn = prompt.substr(begin, prompt.find(kEos, begin) + kEos.size() - begin);
      const Completion completion = parse_completion(turn, kThinking);
      ASSERT_TRUE(completion.ok) << completion.error << "\n" << turn;
      const bool known =
          std::any_of(messages.items().begin(), messages.items().end(), [&](const PyJson& m) {
            const PyJson* reasoning = m.find("reasoning_content");
            const PyJson* content = m.find_set("content");
            return reasoning != nullptr && reasoning->text() == completion.reasoning &&
                   (content == nullptr ? "" : content->text()) == completion.content;
          });
      EXPECT_TRUE(known) << turn;
      ++turns;
    }
  }
  EXPECT_EQ(turns, 5);
}

}  // namespace
}  // namespace hadal::text
