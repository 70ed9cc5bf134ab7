#include "text/tool_calls.h"

#include <algorithm>
#include <filesystem>
#include <random>

#include <gtest/gtest.h>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/completion_check.h"
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
  // What is no JSON becomes one string parameter; JSON that is no object is an error.
  EXPECT_NE(
      write_tool_calls(std::vector{ToolCall{"g", "{not json"}})
          .find(wire(
              "<|DSML|parameter name=\"arguments\" string=\"true\">{not json</|DSML|parameter>")),
      std::string::npos);
  EXPECT_THROW(write_tool_calls(std::vector{ToolCall{"g", "7"}}), InputError);
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

struct Case {
  bool ok;
  ThinkingMode mode;
  std::string text;
};

std::vector<Case> cases() {
  const auto invoke = [](std::string_view inside) {
    return block(concat("<|DSML|invoke", inside, "</|DSML|invoke>\n"));
  };
  const auto parameter = [&](std::string_view inside) {
    return invoke(concat(" name=\"f\">\n<|DSML|parameter", inside, "/|DSML|parameter>\n"));
  };
  return {
      {true, kChat, wire("$")},
      {true, kChat, wire("answer$")},
      {true, kThinking, wire("why</think>answer$")},
      {true, kThinking, wire("</think>$")},
      {true, kChat, wire("a < b, \n\n<c> and </thin> | \n\n<|D$")},
      {true, kChat, "c" + block(kCall) + std::string(kEos)},
      {true, kChat, "c" + block(kCall)},
      {true, kChat, "c\n" + block(kCall + kCall)},
      {true, kThinking, "r</think>" + block(kCall)},
      {true, kChat, block("")},
      {true, kChat, invoke(" name=\"f\">\n")},
      {true, kChat, invoke(" name=\"f\">\n\n")},
      {true, kChat, invoke("\u3000\n name=\"f\">\n")},
      {true, kChat, invoke("name=\"\">\n\">\n")},
      {true, kChat, parameter(" name=\"a\" string=\"true\"><")},
      {true, kChat, parameter(" name=\"a\" string=\"true\"><<")},
      {true, kChat, parameter(" name=\"a\" string=\"true\">x<\n")},
      {true, kChat, parameter(" name=\"a\" string=\"true\">x\" string=\"false\">y<")},
      {true, kChat, wire("bad \xFF bytes$")},
      {false, kChat, ""},
      {false, kChat, "no end"},
      {false, kThinking, wire("no thinking$")},
      {false, kThinking, "r" + block(kCall) + "</think>"},
      {false, kThinking, wire("a</think>b</think>$")},
      {false, kThinking, wire("<think>a</think>b$")},
      {false, kChat, wire("a</think>b$")},
      {false, kChat, wire("a|DSML|b$")},
      {false, kChat, wire("\n<|DSML|tool_calls>$")},
      {false, kChat, wire("\n\n<|DSML|tool_call>$")},
      {false, kChat, wire("\n\n<|DSML|tool_calls")},
      {false, kChat, wire("\n\n<|DSML|tool_calls>\n")},
      {false, kChat, wire("\n\n<|DSML|tool_calls>$")},
      {false, kChat, concat("a", kBos, "b", kEos)},
      {false, kChat, wire("a$b")},
      {false, kChat, wire("a$$")},
      {false, kChat, block(kCall) + "x"},
      {false, kChat, block(kCall) + wire("$\n")},
      {false, kChat, block(kCall).substr(0, block(kCall).size() - 1)},
      {false, kChat, block("\n" + kCall)},
      {false, kChat, block(kCall + "x")},
      {false, kChat, block(kCall.substr(0, kCall.size() - 1))},
      {false, kChat, invoke("")},
      {false, kChat, invoke(" name='f'>\n")},
      {false, kChat, invoke(" name=\"f\">")},
      {false, kChat, invoke(" name=\"f\">\n\n\n")},
      {false, kChat, invoke("x name=\"f\">\n")},
      {false, kChat, parameter("name=\"a\" string=\"true\">x<")},
      {false, kChat, parameter(" name=\"a\" string=\"maybe\">x<")},
      {false, kChat, parameter(" name=\"a\">x<")},
      {false, kChat, parameter(" name=\"a\" string=\"true\">x")},
      {false, kChat,
       invoke(" name=\"f\">\n<|DSML|parameter name=\"a\" string=\"true\">x</|DSML|parameter>")},
      {false, kChat,
       invoke(" name=\"f\">\n<|DSML|parameter name=\"a\" string=\"true\">x</|DSML|parameter>\n"
              "<|DSML|parameter name=\"a\" string=\"true\">y</|DSML|parameter>\n")},
  };
}

TEST(ToolCalls, AcceptsExactlyTheWellFormed) {
  for (const Case& c : cases()) {
    const Completion completion = parse_completion(c.text, c.mode);
    EXPECT_EQ(completion.ok, c.ok) << c.text << "\n" << completion.error;
    EXPECT_EQ(completion.error.empty(), c.ok);
  }
  EXPECT_EQ(parse_completion(wire("bad \xFF bytes$"), kChat).content, "bad \uFFFD bytes");
}

TEST(ToolCalls, CornersOfTheExpressions) {
  const auto only = [](const std::string& text) {
    const Completion completion = parse_completion(text, kChat);
    return completion.tool_calls.size() == 1 ? completion.tool_calls[0]
                                             : ToolCall{"?", completion.error};
  };
  const auto value = [&](std::string_view inside) {
    return only(block(concat("<|DSML|invoke name=\"f\">\n<|DSML|parameter", inside,
                             "/|DSML|parameter>\n</|DSML|invoke>\n")))
        .arguments;
  };
  EXPECT_EQ(value(" name=\"a\" string=\"true\">x<<"), R"({"a": "x<"})");
  EXPECT_EQ(value(" name=\"a\" string=\"true\">x<\n"), R"({"a": "x"})");
  EXPECT_EQ(value(" name=\"a\" string=\"true\">x\n<"), R"({"a": "x\n"})");
  EXPECT_EQ(value(" name=\"a\" string=\"false\">not checked<"), R"({"a": not checked})");
  EXPECT_EQ(value(" name=\"a\"b\" string=\"true\"><"), R"({"a\"b": ""})");
  EXPECT_EQ(value(" name=\"a\" string=\"false\">1\" string=\"true\">2<"),
            R"({"a": 1" string="true">2})");
  EXPECT_EQ(only(block("<|DSML|invoke name=\"a\">\n\">\n</|DSML|invoke>\n")).name, "a\">\n");
}

TEST(CompletionParser, EveryCutGivesTheWholesResult) {
  for (const Case& c : cases()) {
    for (size_t cut = 0; cut <= c.text.size(); ++cut) {
      ASSERT_EQ(check_cutting(c.text, c.mode, {cut}), "") << c.text << "\ncut at " << cut;
    }
    std::vector<size_t> every;
    for (size_t cut = 1; cut < c.text.size(); ++cut) every.push_back(cut);
    ASSERT_EQ(check_cutting(c.text, c.mode, every), "") << c.text << "\nbyte by byte";
  }
}

TEST(CompletionParser, RandomTextAndRandomCutsGiveTheWholesResult) {
  std::mt19937 random(23);
  const std::vector<Case> known = cases();
  const std::string parts[] = {"\n",
                               "\n\n",
                               "<",
                               "</",
                               ">",
                               ">\n",
                               wire("|"),
                               wire("|DSML|"),
                               "tool_calls",
                               "invoke",
                               "parameter",
                               " name=\"a\"",
                               " string=\"true\"",
                               wire("$"),
                               "think>",
                               "x",
                               "\u00e9",
                               "\xF0\x9F",
                               "\""};
  int well_formed = 0;
  for (int round = 0; round < 6000; ++round) {
    // A known text with a part put in, replaced or cut out; or parts alone.
    std::string text = random() % 4 == 0 ? std::string() : known[random() % known.size()].text;
    for (size_t edits = random() % 3 + (text.empty() ? random() % 20 : 0); edits > 0; --edits) {
      const size_t pos = random() % (text.size() + 1);
      text.replace(pos, random() % 4, random() % 3 == 0 ? "" : parts[random() % std::size(parts)]);
    }
    const ThinkingMode mode = random() % 2 == 0 ? kChat : kThinking;
    std::vector<size_t> cuts;
    for (size_t n = random() % 8; n > 0; --n) cuts.push_back(random() % (text.size() + 1));
    std::sort(cuts.begin(), cuts.end());
    ASSERT_EQ(check_cutting(text, mode, cuts), "") << text;
    well_formed += parse_completion(text, mode).ok ? 1 : 0;
  }
  EXPECT_GT(well_formed, 300);
}

TEST(CompletionParser, TextIsHeldBackOnlyWhileItCouldBeMarkup) {
  CompletionParser parser(kChat);
  const auto push = [&](std::string_view bytes) {
    std::string text;
    for (const CompletionEvent& event : parser.push(bytes)) text += event.text;
    return text;
  };
  EXPECT_EQ(push("a <"), "a ");
  EXPECT_EQ(push("b\n"), "<b");
  EXPECT_EQ(push("\nc"), "\n\nc");
  EXPECT_EQ(push("\xE4\xBD"), "");
  EXPECT_EQ(push("\xA0\n\n<"), "\u4f60");
  EXPECT_EQ(push("d</"), "\n\n<d");
  EXPECT_FALSE(parser.malformed());
  EXPECT_EQ(push("think>"), "");
  EXPECT_TRUE(parser.malformed());
}

TEST(CompletionParser, ArgumentsComeWhileTheyAreWritten) {
  CompletionParser parser(kChat);
  std::string name;
  bool complete = false;
  const auto push = [&](std::string_view bytes) {
    std::string pieces;
    for (const CompletionEvent& event : parser.push(wire(bytes))) {
      if (event.kind == CompletionEvent::Kind::kCallBegin) name = event.call.name;
      if (event.kind == CompletionEvent::Kind::kToolCall) complete = true;
      pieces += event.unchecked ? concat("[", event.text, "]") : event.text;
    }
    return pieces;
  };
  EXPECT_EQ(push("\n\n<|DSML|tool_calls>\n<|DSML|invoke name=\"f\">\n"), "");
  EXPECT_EQ(push("<|DSML|parameter"), "{");
  EXPECT_EQ(name, "f");
  EXPECT_EQ(push(" name=\"a\" string=\"true\""), "");
  EXPECT_EQ(push(">"), "\"a\": \"");
  EXPECT_EQ(push("say \"x\"\n"), "say \\\"x\\\"\\n");
  EXPECT_EQ(push("1 <"), "1 ");
  EXPECT_EQ(push("2 <"), "<2 ");
  EXPECT_EQ(push("\n"), "");
  EXPECT_EQ(push("/|DSM"), "");
  EXPECT_EQ(push("."), "<\\n/\uff5cDSM.");
  EXPECT_EQ(push("</|DSML|"), "");
  EXPECT_EQ(push("parameter>\n<|DSML|parameter name=\"b\" string=\"false\">"), "\", \"b\": []");
  EXPECT_EQ(push("[1,"), "[[1,]");
  EXPECT_EQ(push(" 2]"), "[ 2]]");
  EXPECT_EQ(push("</|DSML|parameter>\n"), "");
  EXPECT_FALSE(complete);
  EXPECT_EQ(push("</|DSML|invoke"), "}");
  EXPECT_TRUE(complete);
}

TEST(CompletionParser, ACallThatFailsHasTheSamePiecesForEveryCut) {
  const std::string head =
      "\n\n<|DSML|tool_calls>\n<|DSML|invoke name=\"f\">\n<|DSML|parameter name=\"a\" string=\"";
  for (const char* rest :
       {"true\">x<\n</|DSML|/|DSML|parameter>", "false\">[1]</|DSM/|DSML|parameter",
        "true\">x</|DSML|parameter>\n!", "true\">x <\n/|DSML|", "true\">x\n/|DSML|parameter"}) {
    const std::string text = wire(head + rest);
    const auto open_call = [&](size_t cut) {
      CompletionParser parser(kChat);
      EventSums sums;
      for (const CompletionEvent& event : parser.push(text.substr(0, cut))) sums.add(event);
      for (const CompletionEvent& event : parser.push(text.substr(cut))) sums.add(event);
      std::vector<CompletionEvent> last;
      parser.finish(last);
      for (const CompletionEvent& event : last) sums.add(event);
      EXPECT_TRUE(sums.is_open && sums.error.empty()) << rest;
      return sums.open.arguments;
    };
    const std::string whole = open_call(0);
    for (size_t cut = 1; cut <= text.size(); ++cut) ASSERT_EQ(open_call(cut), whole) << text;
  }
}

TEST(CompletionParser, LongPiecesAreNotCutInsideACharacter) {
  for (size_t before = 4090; before < 4100; ++before) {
    const std::string text = std::string(before, 'x') + "\u4f60\u597d" + std::string(kEos);
    ASSERT_EQ(check_cutting(text, kChat, {}), "") << before;
  }
}

TEST(CompletionParser, ACutOffAnswerKeepsItsText) {
  CompletionParser parser(kChat);
  std::vector<CompletionEvent> events = parser.push("1 <");
  const Completion completion = parser.finish(events);
  EXPECT_FALSE(completion.ok);
  EXPECT_EQ(completion.content, "1 <");
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[1].text, "<");
}

TEST(CompletionParser, LongInputInSmallPiecesIsNotQuadratic) {
  const std::string big(2'000'000, 'x');
  const std::string text =
      block(concat("<|DSML|invoke name=\"f\">\n<|DSML|parameter name=\"a\" string=\"true\">", big,
                   "</|DSML|parameter>\n</|DSML|invoke>\n"));
  CompletionParser parser(kChat);
  std::vector<CompletionEvent> events;
  for (size_t pos = 0; pos < text.size(); pos += 4)
    parser.push(std::string_view(text).substr(pos, 4));
  const Completion completion = parser.finish(events);
  ASSERT_TRUE(completion.ok) << completion.error;
  EXPECT_EQ(completion.tool_calls[0].arguments.size(), big.size() + 9);
}

TEST(CompletionParser, OfficialTurnsParseBack) {
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
