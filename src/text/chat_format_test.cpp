#include "text/chat_format.h"

#include <filesystem>

#include <gtest/gtest.h>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/tokenizer_file.h"
#include "text/tool_calls.h"

namespace hadal::text {
namespace {

const std::string kBosText(kBos);
const std::string kEosText(kEos);
const std::string kUserText(kUser);
const std::string kOpen = std::string(kAssistant) + "<think>";
const std::string kClosed = std::string(kAssistant) + "</think>";

PyJson json(std::string_view text) { return PyJson::parse(text, "test"); }

std::string thinking(std::string_view messages) { return encode_chat(json(messages), {}); }
std::string chat(std::string_view messages) {
  return encode_chat(json(messages), {.thinking_mode = ThinkingMode::kChat});
}

TEST(ChatFormat, ReproducesTheOfficialPrompts) {
  const std::string folder = HADAL_SOURCE_DIR "/../shared/data/dsv4-encoding-tests/";
  if (!std::filesystem::exists(folder)) GTEST_SKIP() << "absent: " << folder;
  for (int i = 1; i <= 4; ++i) {
    const std::string stem = concat(folder, "test_input_", i, ".json");
    const PyJson messages = messages_of_request(PyJson::parse(read_file(stem), stem));
    const ChatOptions options{.thinking_mode =
                                  i == 4 ? ThinkingMode::kChat : ThinkingMode::kThinking};
    const std::string expected = read_file(concat(folder, "test_output_", i, ".txt"));
    EXPECT_EQ(encode_chat(messages, options), expected) << stem;
  }
}

TEST(ChatFormat, TurnsAndModes) {
  const char* two =
      R"([{"role":"user","content":"a"},{"role":"assistant","content":"b","reasoning_content":"r"},
                        {"role":"user","content":"c"}])";
  EXPECT_EQ(thinking(two),
            kBosText + kUserText + "a" + kClosed + "b" + kEosText + kUserText + "c" + kOpen);
  EXPECT_EQ(chat(two),
            kBosText + kUserText + "a" + kClosed + "b" + kEosText + kUserText + "c" + kClosed);
  EXPECT_EQ(encode_chat(json(two), {.drop_thinking = false}),
            kBosText + kUserText + "a" + kOpen + "r</think>b" + kEosText + kUserText + "c" + kOpen);
  EXPECT_EQ(encode_chat(json("[]"), {}), kBosText);
  EXPECT_EQ(encode_chat(json("[]"), {.add_bos = false}), "");
  EXPECT_EQ(chat(R"([{"role":"system","content":null},{"role":"user","content":"hi"}])"),
            kBosText + kUserText + "hi" + kClosed);
  EXPECT_EQ(thinking(R"([{"role":"assistant","content":null,"wo_eos":true}])"),
            kBosText + "</think>");
}

TEST(ChatFormat, EffortActsOnlyAsMaxInThinkingMode) {
  const PyJson messages =
      json(R"([{"role":"system","content":"S"},{"role":"user","content":"u"}])");
  const std::string plain = encode_chat(messages, {});
  EXPECT_EQ(encode_chat(messages, {.effort = ReasoningEffort::kHigh}), plain);
  const std::string max = encode_chat(messages, {.effort = ReasoningEffort::kMax});
  ASSERT_EQ(max.size(), plain.size() + 476);
  EXPECT_EQ(max.substr(kBos.size(), 17), "Reasoning Effort:");
  EXPECT_EQ(max.substr(kBos.size() + 476), plain.substr(kBos.size()));
  EXPECT_EQ(max.substr(kBos.size() + 474, 3), "\n\nS");
  const ChatOptions chat_max{.thinking_mode = ThinkingMode::kChat, .effort = ReasoningEffort::kMax};
  EXPECT_EQ(encode_chat(messages, chat_max),
            encode_chat(messages, {.thinking_mode = ThinkingMode::kChat}));
  EXPECT_THROW(parse_reasoning_effort("low"), InputError);
  EXPECT_THROW(parse_thinking_mode("think"), InputError);
}

TEST(ChatFormat, UsersAndToolResultsMerge) {
  EXPECT_EQ(chat(R"([{"role":"user","content":"a"},{"role":"user","content":"b","task":"query"}])"),
            kBosText + kUserText + "a\n\nb" + kClosed);  // the merged user loses its task
  // A user with a task takes no further user, but a tool result.
  EXPECT_EQ(chat(R"([{"role":"user","content":"a","task":"query"},{"role":"user","content":"b"}])"),
            kBosText + kUserText + "a" + kUserText + "b" + kClosed);
  EXPECT_EQ(chat(R"([{"role":"user","content":"a","task":"query"},{"role":"tool","content":"t"}])"),
            kBosText + kUserText + "a\n\n<tool_result>t</tool_result>" +
                std::string(kTaskTokens[1].token));
  EXPECT_EQ(chat(
                R"([{"role":"tool","content":[{"type":"text","text":"x"},{"type":"image"},{}]},
              {"role":"user","content":"u"}])"),
            kBosText + kUserText +
                "<tool_result>x\n\n[Unsupported image]\n\n[Unsupported None]</tool_result>\n\nu" +
                kClosed);
  // Tools on a user message are lost, also for the decision to keep reasoning.
  EXPECT_EQ(thinking(
                R"([{"role":"user","content":"a","tools":[{"function":{}}]},{"role":"assistant",
              "content":"b","reasoning_content":"r"},
                        {"role":"user","content":"c"}])"),
            kBosText + kUserText + "a" + kClosed + "b" + kEosText + kUserText + "c" + kOpen);
}

TEST(ChatFormat, ToolResultsFollowTheOrderOfTheCalls) {
  const std::string calls =
      R"({"role":"assistant","tool_calls":[{"id":"1","function":{"name":"f","arguments":"{}"}},
          {"function":{"id":"2","name":"g","arguments":"{}"}},
              {"id":"3","function":{"name":"h","arguments":"{}"}}]},)";
  const auto results = [&](const std::string& rest) {
    const std::string prompt = chat("[" + calls + rest + "]");
    return prompt.substr(prompt.rfind(kUserText) + kUserText.size());
  };
  EXPECT_EQ(
      results(R"({"role":"tool","tool_call_id":"3","content":"c"},{"role":"user","content":"u"},
                       {"role":"tool","tool_call_id":"1","content":"a"},
                           {"role":"tool","tool_call_id":"2","content":"b"})"),
      "<tool_result>a</tool_result>\n\nu\n\n<tool_result>b</tool_result>\n\n<tool_result>c</"
      "tool_result>" +
          kClosed);
  // An unknown id counts as the first call; the sort is stable.
  EXPECT_EQ(
      results(
          R"({"role":"tool","tool_call_id":"2","content":"b"},{"role":"tool","tool_call_id":"?",
              "content":"x"},
                       {"role":"tool","tool_call_id":"1","content":"a"})"),
      "<tool_result>x</tool_result>\n\n<tool_result>a</tool_result>\n\n<tool_result>b</"
      "tool_result>" +
          kClosed);
}

TEST(ChatFormat, DroppingRemovesEarlierDevelopers) {
  EXPECT_EQ(thinking(
                R"([{"role":"developer","content":"d"},{"role":"assistant","content":"b",
              "reasoning_content":"r"},
                        {"role":"user","content":"c"}])"),
            kBosText + "b" + kEosText + kUserText + "c" + kOpen);
  EXPECT_EQ(chat(
                R"([{"role":"developer","content":"d"},{"role":"assistant","content":"b"},
              {"role":"user","content":"c"}])"),
            kBosText + kUserText + "d" + kClosed + "b" + kEosText + kUserText + "c" + kClosed);
}

TEST(ChatFormat, Tasks) {
  const std::string action(kTaskTokens[0].token);
  EXPECT_EQ(thinking(R"([{"role":"user","content":"a","task":"action"}])"),
            kBosText + kUserText + "a" + kOpen + action);
  EXPECT_EQ(chat(
                R"([{"role":"user","content":"a","task":"action"},{"role":"assistant",
              "content":"Search"}])"),
            kBosText + kUserText + "a" + kClosed + action + "Search" + kEosText);
  EXPECT_EQ(
      thinking(
          R"([{"role":"user","content":"a","task":"title"},{"role":"assistant","content":"T"}])"),
      kBosText + kUserText + "a" + std::string(kTaskTokens[4].token) + "T" + kEosText);
  // Before another user the task token is not written.
  EXPECT_EQ(
      chat(R"([{"role":"assistant","content":"x","task":"domain"},{"role":"user","content":"b"}])"),
      kBosText + "x" + kEosText + kUserText + "b" + kClosed);
  EXPECT_EQ(chat(
                R"([{"role":"latest_reminder","content":"now"},{"role":"user","content":"b",
              "task":null}])"),
            kBosText + std::string(kLatestReminder) + "now" + kUserText + "b" + kClosed);
}

TEST(ChatFormat, ToolsAndResponseFormat) {
  const std::string prompt = chat(
      R"([{"role":"system","content":"S","tools":[{"function":{"a":1.50,"b":"\u00e9"}},
          {"function":{}}],
                                      "response_format":{"type":"json"}},{"role":"user",
                                          "content":"u"}])");
  const std::string schemas = "{\"a\": 1.5, \"b\": \"\u00e9\"}\n{}";
  EXPECT_NE(prompt.find("### Available Tool Schemas\n\n" + schemas + "\n\nYou MUST"),
            std::string::npos);
  const size_t begin = prompt.find("## Tools");
  const size_t end = prompt.find("\n\n## Response Format:");
  EXPECT_EQ(end - begin, 989 + schemas.size());  // the block is 990 bytes with the schema text "X"
  EXPECT_NE(prompt.find("to reply:\n{\"type\": \"json\"}" + kUserText), std::string::npos);
  EXPECT_EQ(chat(R"([{"role":"system","content":"S","tools":[],"response_format":{}}])"),
            kBosText + "S");
}

TEST(ChatFormat, ContextIsKnownButNotWritten) {
  const char* cases[] = {
      R"([{"role":"system","content":"s","tools":[{"function":{"name":"f"}}]},{"role":"user",
          "content":"a"},
          {"role":"assistant",
              "reasoning_content":"r",
               "tool_calls":[{"id":"1","function":{"name":"f","arguments":"{}"}}]},
          {"role":"tool","tool_call_id":"1","content":"t"},{"role":"assistant",
              "reasoning_content":"q","content":"b"},
          {"role":"user","content":"c"}])",
      R"([{"role":"user","content":"a"},{"role":"assistant","reasoning_content":"r",
          "content":"b"}])"};
  for (const char* text : cases) {
    const PyJson all = json(text);
    const std::string whole = encode_chat(all, {});
    for (size_t cut = 1; cut < all.items().size(); ++cut) {
      // Cuts behind a turn opener: the opener belongs to what stands before it.
      if (all.items()[cut].find("role")->text() != "assistant") continue;
      const auto middle = all.items().begin() + static_cast<std::ptrdiff_t>(cut);
      const PyJson context = PyJson::array({all.items().begin(), middle});
      const PyJson rest = PyJson::array({middle, all.items().end()});
      EXPECT_EQ(encode_chat(context, {}) + encode_chat(rest, {}, context), whole) << text << cut;
    }
  }
}

TEST(ChatFormat, RangesCoverWhatMessagesBring) {
  const PyJson messages =
      json(R"([{"role":"system","content":"S","tools":[{"function":{"name":"F"}},
      {"function":{"name":"G"}}],"response_format":{"type":"R"}},{"role":"user",
      "content":"<think>"},{"role":"tool","content":"</think>"},{"role":"user","content":""},
      {"role":"developer","content":"D"},{"role":"latest_reminder","content":"L"},
      {"role":"assistant","reasoning_content":"Q","content":"A","tool_calls":[
      {"function":{"name":"N","arguments":"{\"k\": \"v\", \"e\": \"\", \"o\": [1]}"}}]},
      {"role":"user","content":"u"},{"role":"assistant","content":"P","wo_eos":true}])");
  const ChatPrompt prompt = render_chat(messages, {});
  EXPECT_EQ(prompt.text, encode_chat(messages, {}));
  std::vector<std::string> parts;
  std::string ours;
  size_t done = 0;
  for (const TextRange& range : prompt.foreign) {
    ASSERT_TRUE(done <= range.begin && range.begin < range.end);
    parts.push_back(prompt.text.substr(range.begin, range.end - range.begin));
    ours += prompt.text.substr(done, range.begin - done);
    done = range.end;
  }
  EXPECT_EQ(parts, (std::vector<std::string>{"S", R"({"name": "F"})", R"({"name": "G"})",
                                             R"({"type": "R"})", "<think>", "</think>", "D", "L",
                                             "Q", "A", "N", "k", "v", "e", "o", "[1]", "u", "P"}));
  EXPECT_NE(ours.find("<\uff5cDSML\uff5cinvoke name=\"\">\n"), std::string::npos) << ours;
}

TEST(ChatFormat, OfficialPromptsKeepTheirIds) {
  const std::string data = HADAL_SOURCE_DIR "/../shared/data/";
  const std::string tokenizer_path = data + "deepseek-v4-tokenizer/tokenizer.json";
  if (!std::filesystem::exists(tokenizer_path)) GTEST_SKIP() << "absent: " << tokenizer_path;
  const Tokenizer tokenizer = Tokenizer::from_file(tokenizer_path);
  for (int i = 1; i <= 4; ++i) {
    const std::string stem = concat(data, "dsv4-encoding-tests/test_input_", i, ".json");
    const ChatPrompt prompt =
        render_chat(messages_of_request(PyJson::parse(read_file(stem), stem)), {});
    EXPECT_FALSE(prompt.foreign.empty());
    EXPECT_EQ(tokenizer.encode(prompt.text, prompt.foreign),
              tokenizer.encode(prompt.text, SpecialTokens::kRecognise))
        << stem;
  }
}

TEST(ChatFormat, BadMessagesAreNamed) {
  const auto expect = [](std::string_view messages, std::string_view part) {
    try {
      encode_chat(messages_of_request(json(messages)), {});
      ADD_FAILURE() << "no error: " << messages;
    } catch (const InputError& error) {
      EXPECT_NE(std::string_view(error.what()).find(part), std::string_view::npos) << error.what();
    }
  };
  expect("7", "expected a list of messages");
  expect("{}", "no list 'messages'");
  expect(R"({"messages":[],"tools":[{}]})", "no message to attach");
  expect("[1]", "messages[0] is an integer");
  expect("[{}]", "messages[0] has no role");
  expect(R"([{"role":"user","content":null}])", "content is null");
  expect(R"([{"role":"user","content":["x"]}])", "content is a list");
  expect(R"([{"role":"user"}])", "content is absent");
  expect(R"([{"role":"robot","content":"x"}])", "unknown role");
  expect(R"([{"role":"developer","content":""}])", "content is empty");
  expect(R"([{"role":"system","content":{}}])", "content is an object");
  expect(R"([{"role":"tool","content":7}])", "content is an integer");
  expect(R"([{"role":"latest_reminder"}])", "content is absent");
  expect(R"([{"role":"user","content":"x","task":"sing"}])", "task is \"sing\"");
  expect(R"([{"role":"system","tools":{"a":1}}])", "tools is an object");
  expect(R"([{"role":"system","tools":[{}]}])", "no 'function'");
  expect(R"([{"role":"assistant","tool_calls":[{}]}])", "no function name");
  expect(R"([{"role":"assistant","tool_calls":"x"}])", "tool_calls is a string");
}

}  // namespace
}  // namespace hadal::text
