#include "engine_core/answer/stop.h"

#include <random>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::engine_core {
namespace {

std::shared_ptr<const StopSet> stop_set(const std::vector<std::string>& stops) {
  return std::make_shared<const StopSet>(stops);
}

/// The definition: the answer is the repaired text before the stop string that ends first, of
/// several the longest.
struct Answer {
  std::string text;
  std::optional<std::string> matched;
};
Answer search_whole_text(const std::string& bytes, const std::vector<std::string>& stops) {
  const std::string text = text::repair_utf8(bytes);
  Answer best{text, std::nullopt};
  size_t best_end = std::string::npos;
  for (const std::string& raw : stops) {
    const std::string stop = text::repair_utf8(raw);
    const size_t begin = text.find(stop);
    if (begin == std::string::npos) continue;
    const size_t end = begin + stop.size();
    if (end < best_end || (end == best_end && begin < best.text.size())) {
      best = {text.substr(0, begin), stop};
      best_end = end;
    }
  }
  return best;
}

TEST(StopStream, HoldsBackWhatMayBecomeAStopString) {
  StopStream stream(stop_set({"STOP", "TOE"}));
  EXPECT_EQ(stream.push("say ST"), "say ");
  EXPECT_EQ(stream.pending(), 2u);
  EXPECT_EQ(stream.push("O"), "");
  EXPECT_EQ(stream.push("E and more"), "S");
  EXPECT_EQ(stream.matched(), "TOE");
  EXPECT_EQ(stream.push("x"), "");
  EXPECT_EQ(stream.finish(), "");
}

TEST(StopStream, LetsGoOfWhatDoesNotBecomeOne) {
  StopStream stream(stop_set({"\n\nUser:"}));
  EXPECT_EQ(stream.push("a\n"), "a");
  EXPECT_EQ(stream.push("\n"), "");
  EXPECT_EQ(stream.push("\nU"), "\n");
  EXPECT_EQ(stream.finish(), "\n\nU");
  EXPECT_FALSE(stream.stopped());
}

TEST(StopStream, CutsInsideCharacters) {
  // The second bytes differ, the first do not.
  StopStream stream(stop_set({"\u00e9\u00e8"}));
  EXPECT_EQ(stream.push("\xC3"), "");
  EXPECT_EQ(stream.push("\xA9\xC3"), "");
  EXPECT_EQ(stream.push("\xA9"), "\u00e9");
  EXPECT_EQ(stream.push("\xC3\xA8!"), "");
  EXPECT_EQ(stream.matched(), "\u00e9\u00e8");
  StopStream broken(stop_set({"\uFFFD"}));
  EXPECT_EQ(broken.push("ab\xE2\x82"), "ab");
  EXPECT_EQ(broken.finish(), "");
  EXPECT_EQ(broken.matched(), "\uFFFD");
}

TEST(StopStream, WithoutStopStringsIsTheUtf8Stream) {
  StopStream stream(nullptr);
  EXPECT_EQ(stream.push("a\xF0\x9F"), "a");
  EXPECT_EQ(stream.push("\x98\x80"), "\U0001F600");
  EXPECT_EQ(stream.push("\xF0"), "");
  EXPECT_EQ(stream.finish(), "\uFFFD");
  EXPECT_THROW(stop_set({"a", ""}), InputError);
}

// Random texts and stop strings over few pieces, so that they overlap, cut anywhere. After every
// piece: what is out is whole characters, and all of the text that no stop string can take back.
TEST(StopStream, EqualsTheSearchOfTheWholeText) {
  const std::vector<std::string> pieces = {"a",    "b",      "ab",         "\n",
                                           "\xC3", "\u00e9", "\U0001F600", "\x98"};
  std::mt19937_64 random(11);
  const auto draw = [&](size_t below) { return static_cast<size_t>(random() % below); };
  const auto draw_text = [&](size_t least, size_t most) {
    std::string text;
    for (size_t i = least + draw(most - least + 1); i > 0; --i) text += pieces[draw(pieces.size())];
    return text;
  };
  int matches = 0;
  for (int round = 0; round < 20000; ++round) {
    std::vector<std::string> stops(draw(5));
    for (std::string& stop : stops) stop = draw_text(1, 4);
    const auto set = stop_set(stops);
    const std::string bytes = draw_text(0, 12);
    const Answer expected = search_whole_text(bytes, stops);
    StopStream stream(set);
    std::string text;
    for (size_t pos = 0; pos < bytes.size();) {
      const size_t count = std::min(bytes.size() - pos, draw(5));
      text += stream.push(std::string_view(bytes).substr(pos, count));
      pos += count;
      ASSERT_EQ(text::valid_utf8_prefix(text), text.size());
      ASSERT_TRUE(expected.text.starts_with(text)) << round;
      if (stream.stopped()) continue;
      size_t longest = 3;
      for (const std::string& stop : stops) {
        longest = std::max(longest, text::repair_utf8(stop).size() + 2);
      }
      ASSERT_LE(stream.pending(), longest);
    }
    text += stream.finish();
    ASSERT_EQ(text, expected.text) << round;
    ASSERT_EQ(stream.matched(), expected.matched) << round;
    matches += expected.matched.has_value();
  }
  EXPECT_GT(matches, 3000);
}

}  // namespace
}  // namespace hadal::engine_core
