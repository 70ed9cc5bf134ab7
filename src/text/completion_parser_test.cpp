// CompletionParser: what is well-formed reads as the official code reads it, every cut gives the
// same, and special tokens alone have a meaning.
#include "text/completion_parser.h"

#include <algorithm>
#include <optional>
#include <random>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/tiny_tokenizer.h"
#include "text/chat_tokens.h"
#include "text/completion_check.h"
#include "text/official_completion.h"

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
      {true, kChat, parameter(" name=\"a\" string=\"true\"><")},
      {true, kChat, parameter(" name=\"a\" string=\"true\"><<")},
      {true, kChat, parameter(" name=\"a\" string=\"true\">x<\n")},
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

TEST(CompletionParser, AgreesWithTheOfficialCodeOnWhatIsWellFormed) {
  for (const Case& c : cases()) {
    const Completion completion = parse_completion(c.text, c.mode);
    const Completion official = official::read_completion(c.text, c.mode);
    EXPECT_EQ(completion.ok, c.ok) << c.text << "\n" << completion.error;
    EXPECT_EQ(official.ok, c.ok) << c.text << "\n" << official.error;
    if (!c.ok) continue;
    EXPECT_EQ(completion.reasoning, official.reasoning) << c.text;
    EXPECT_EQ(completion.content, official.content) << c.text;
    EXPECT_EQ(completion.tool_calls, official.tool_calls) << c.text;
  }
  EXPECT_EQ(parse_completion(wire("bad \xFF bytes$"), kChat).content, "bad \uFFFD bytes");
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

TEST(CompletionParser, LongPiecesAreNotCutInsideACharacter) {
  for (size_t before = 4090; before < 4100; ++before) {
    const std::string text = std::string(before, 'x') + "\u4f60\u597d" + std::string(kEos);
    ASSERT_EQ(check_cutting(text, kChat, {}), "") << before;
  }
}

TEST(CompletionParser, LongInputInSmallPiecesIsNotQuadratic) {
  const std::string big(2'000'000, 'x');
  const std::string text =
      block(concat("<|DSML|invoke name=\"f\">\n<|DSML|parameter name=\"a\" string=\"true\">", big,
                   "</|DSML|parameter>\n</|DSML|invoke>\n"));
  CompletionParser parser(kChat);
  std::vector<CompletionEvent> events;
  std::vector<size_t> cuts;
  for (size_t pos = 4; pos < text.size(); pos += 4) cuts.push_back(pos);
  push_cut(parser, text, cuts, [](const auto&) {});
  const Completion completion = parser.finish(events);
  ASSERT_TRUE(completion.ok) << completion.error;
  EXPECT_EQ(completion.tool_calls[0].arguments.size(), big.size() + 9);
}

TEST(CompletionParser, TextIsHeldBackOnlyWhileItCouldBelongToATag) {
  CompletionParser parser(kChat);
  const auto push = [&](std::string_view bytes) {
    std::string text;
    for (const CompletionEvent& event : parser.push(bytes)) text += event.text;
    return text;
  };
  EXPECT_EQ(push("a <"), "a");
  EXPECT_EQ(push("b\n"), " <b");
  EXPECT_EQ(push("\nc"), "\n\nc");
  EXPECT_EQ(push("\xE4\xBD"), "");
  EXPECT_EQ(push("\xA0\n\n<"), "\u4f60");
  EXPECT_EQ(push("d</"), "\n\n<d");
  EXPECT_EQ(push("think>"), "</think>");
  EXPECT_EQ(push(std::string(300, ' ')), std::string(300 - 256, ' '));
  std::vector<CompletionEvent> events = parser.push_special(kEos);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].text, std::string(256, ' '));
}

/// Reads pieces in turn ordinary and special, whole and cut everywhere.
Completion read(ThinkingMode mode, const std::vector<std::string>& pieces, bool ends = true) {
  std::optional<Completion> first;
  for (const size_t stride : {size_t{1'000'000}, size_t{1}, size_t{2}, size_t{3}, size_t{5}}) {
    CompletionParser parser(mode);
    EventSums sums;
    const auto take = [&](const std::vector<CompletionEvent>& events) {
      for (const CompletionEvent& event : events) sums.add(event);
    };
    for (size_t i = 0; i < pieces.size(); ++i) {
      if (i % 2 == 1) {
        take(parser.push_special(pieces[i]));
        continue;
      }
      for (size_t pos = 0; pos < pieces[i].size(); pos += stride)
        take(parser.push(std::string_view(pieces[i]).substr(pos, stride)));
    }
    if (ends) take(parser.push_special(kEos));
    std::vector<CompletionEvent> rest;
    Completion found = parser.finish(rest);
    take(rest);
    EXPECT_EQ(sums.error, "");
    EXPECT_EQ(sums.content, found.content);
    EXPECT_EQ(sums.reasoning, found.reasoning);
    EXPECT_EQ(sums.calls, found.tool_calls);
    if (!first) {
      first = std::move(found);
    } else {
      EXPECT_EQ(first->content, found.content);
      EXPECT_EQ(first->reasoning, found.reasoning);
      EXPECT_EQ(first->tool_calls, found.tool_calls);
      EXPECT_EQ(first->error, found.error);
    }
  }
  return std::move(*first);
}

/// Texts that look like structure, and all their beginnings.
std::vector<std::string> look_alikes() {
  std::vector<std::string> texts;
  for (const std::string& whole :
       {std::string(kEos), std::string(kThinkEnd), std::string(kThinkStart), std::string(kBos),
        std::string(tool_block_start()) + ">\n", "\n</" + std::string(kDsml) + "parameter>\n",
        std::string(dsml::kInvoke) + " name=\"f\">\n"}) {
    for (size_t size = 1; size <= whole.size(); ++size) {
      if (valid_utf8_prefix(whole.substr(0, size)) == size) texts.push_back(whole.substr(0, size));
    }
  }
  return texts;
}

TEST(CompletionParser, TextThatLooksLikeStructureIsText) {
  const std::string marker(kDsml), think_end(kThinkEnd);
  for (const std::string& text : look_alikes()) {
    for (const std::string& around : {text, "a " + text, text + " b", "a" + text + "b" + text}) {
      for (const bool ends : {true, false}) {
        EXPECT_EQ(read(kChat, {around}, ends).content, around);
        const Completion thought = read(kThinking, {around, think_end, around}, ends);
        EXPECT_EQ(thought.reasoning, around);
        EXPECT_EQ(thought.content, around);
        EXPECT_EQ(read(kThinking, {around}, false).reasoning, around);
      }
      const Completion call =
          read(kChat, {"c\n\n<", marker, "tool_calls>\n<", marker, "invoke name=\"f\">\n<", marker,
                       "parameter name=\"a\" string=\"true\">" + around + "</", marker,
                       "parameter>\n</", marker, "invoke>\n</", marker, "tool_calls>"});
      EXPECT_TRUE(call.ok) << call.error;
      EXPECT_EQ(call.content, "c");
      ASSERT_EQ(call.tool_calls.size(), 1u);
      EXPECT_EQ(call.tool_calls[0].arguments, concat("{\"a\": ", quote_json(around), "}"));
    }
  }
}

TEST(CompletionParser, OtherSpecialTokensAreNoText) {
  Completion read_so = read(kChat, {"a", std::string(kUser), "b"});
  EXPECT_EQ(read_so.content, "ab");
  EXPECT_FALSE(read_so.ok);
  EXPECT_FALSE(read_so.lost);
  // One that opens reasoning where none was expected does.
  read_so = read(kChat, {"", std::string(kThinkStart), "why", std::string(kThinkEnd), "so"});
  EXPECT_EQ(read_so.reasoning, "why");
  EXPECT_EQ(read_so.content, "so");
}

// What is left out of a tag may bring the pieces of a marker together.
TEST(CompletionParser, ANameNeverHoldsAMarker) {
  const std::string marker(kDsml), first = marker.substr(0, 5), second = marker.substr(5);
  const auto call = [&](const std::string& before, const std::string& behind) {
    return read(
        ThinkingMode::kChat,
        {"a\n\n<", marker, "tool_calls>\n<", marker, "invoke name=\"f" + before,
         std::string(kThinkEnd), behind + "\">\n</", marker, "invoke>\n</", marker, "tool_calls>"});
  };
  const Completion broken = call(first, second);
  EXPECT_TRUE(broken.tool_calls.empty());
  EXPECT_FALSE(broken.ok);
  EXPECT_EQ(broken.content, "a");
  const Completion whole = call("", "g");
  ASSERT_EQ(whole.tool_calls.size(), 1u);
  EXPECT_EQ(whole.tool_calls[0].name, "fg");
}

TEST(CompletionParser, AnEndInsideTheReasoningIsTold) {
  const Completion completion = read(kThinking, {"why"});
  EXPECT_EQ(completion.reasoning, "why");
  EXPECT_TRUE(completion.open_reasoning);
  EXPECT_TRUE(completion.lost);
  EXPECT_FALSE(read(kThinking, {"why"}, false).open_reasoning);
}

TEST(CompletionParser, LongArgumentsComeWhileTheyAreWritten) {
  CompletionParser parser(kChat, {.tools = nullptr, .hold_bytes = 8});
  bool begun = false, complete = false;
  const auto collect = [&](const std::vector<CompletionEvent>& events) {
    std::string pieces;
    for (const CompletionEvent& event : events) {
      begun = begun || event.kind == CompletionEvent::Kind::kCallBegin;
      complete = complete || event.kind == CompletionEvent::Kind::kToolCall;
      pieces += event.text;
    }
    return pieces;
  };
  const auto push = [&](std::string_view text) {
    std::string pieces;
    push_cut(parser, wire(text), {}, [&](const auto& events) { pieces += collect(events); });
    return pieces;
  };
  EXPECT_EQ(push("\n\n<|DSML|tool_calls>\n<|DSML|invoke name=\"f\">\n<|DSML|parameter"), "");
  EXPECT_EQ(push(" name=\"a\" string=\"true\">"), "");
  EXPECT_FALSE(begun);
  EXPECT_EQ(push("say \"x\"\n"), "{\"a\": \"say \\\"x\\\"\\n");
  EXPECT_TRUE(begun);
  EXPECT_EQ(push("1 <"), "1 ");
  EXPECT_EQ(push("2 <"), "<2 ");
  EXPECT_EQ(push("\n"), "");
  EXPECT_EQ(push("/"), "");
  EXPECT_EQ(push("."), "<\\n/.");
  EXPECT_EQ(push("</|DSML|parameter>\n<|DSML|parameter name=\"b\" string=\"false\">"),
            "\", \"b\": ");
  EXPECT_EQ(push("[1, 2]"), "");  // JSON or not: its end tells
  EXPECT_EQ(push("</|DSML|parameter>\n"), "[1, 2]");
  EXPECT_FALSE(complete);
  EXPECT_EQ(push("</|DSML|invoke>"), "}");
  EXPECT_TRUE(complete);
}

TEST(CompletionParser, ACallThatBreaksAfterItWasBegunIsDropped) {
  CompletionParser parser(kChat, {.tools = nullptr, .hold_bytes = 0});
  EventSums sums;
  push_cut(
      parser,
      block("<|DSML|invoke name=\"f\">\n<|DSML|parameter name=\"a\" string=\"true\">x\n" + kCall),
      {}, [&](const auto& events) {
        for (const CompletionEvent& event : events) sums.add(event);
      });
  std::vector<CompletionEvent> rest;
  const Completion completion = parser.finish(rest);
  EXPECT_EQ(sums.error, "");
  EXPECT_EQ(sums.calls.size(), 1u);
  EXPECT_TRUE(completion.lost);
}

}  // namespace
}  // namespace hadal::text
