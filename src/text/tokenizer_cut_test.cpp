#include "text/tokenizer_cut.h"

#include <filesystem>
#include <random>
#include <utility>

#include <gtest/gtest.h>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/tokenizer.h"
#include "text/tokenizer_file.h"

namespace hadal::text {
namespace {

const std::string kSource = HADAL_SOURCE_DIR "/../shared/data/deepseek-v4-tokenizer/tokenizer.json";

#define NEED_SOURCE() \
  if (!std::filesystem::exists(kSource)) GTEST_SKIP() << "absent: " << kSource

/// A text of many common words, and some that stand in it once only.
std::string sample_text() {
  const char* words[] = {"the ",   "ship ",  "of ",   "whales ",    "sailing,\n",
                         "under ", "water ", "1999 ", "caf\u00e9 ", "(deep) "};
  std::mt19937 random(31);
  std::string text;
  for (int i = 0; i < 3000; ++i) text += words[random() % std::size(words)];
  return text + "extraordinarily hydrothermal vents";
}

const std::string& source() {
  static const std::string text = read_file(kSource);
  return text;
}
const Tokenizer& large() {
  static const Tokenizer tokenizer = Tokenizer::from_json(source(), "source");
  return tokenizer;
}
/// Has counted sample_text().
const TokenizerCutter& cutter() {
  static const TokenizerCutter& counted = [&]() -> const TokenizerCutter& {
    static TokenizerCutter made(source(), "source");
    made.add(sample_text());
    return made;
  }();
  return counted;
}
Tokenizer cut(int64_t vocab_size, int64_t min_count) {
  return Tokenizer::from_json(cutter().cut({vocab_size, min_count, chat_token_names()}), "small");
}
int64_t merges_that_occur(int64_t min_count) {
  int64_t merges = 0;
  for (const int64_t count : cutter().merge_counts()) merges += count >= min_count ? 1 : 0;
  return merges;
}

TEST(TokenizerCut, WithEveryMergeThatOccursTheTextIsCutAsBefore) {
  NEED_SOURCE();
  const std::string text = sample_text();
  const auto fixed = static_cast<int64_t>(259 + kChatTokens.size());
  const int64_t merges = merges_that_occur(1);
  const Tokenizer small = cut(fixed + merges, 1);
  EXPECT_EQ(small.vocab_size(), fixed + merges);
  const auto large_ids = large().encode(text, SpecialTokens::kAsText);
  const auto small_ids = small.encode(text, SpecialTokens::kAsText);
  ASSERT_EQ(small_ids.size(), large_ids.size());
  for (size_t i = 0; i < small_ids.size(); ++i) {
    ASSERT_EQ(small.token_bytes(small_ids[i]), large().token_bytes(large_ids[i]));
  }
  // Text it has not seen still comes back whole.
  const std::string other = "Wholly other text: \u4f60\u597d \U0001F40B\n\t0x7F";
  EXPECT_EQ(small.decode(small.encode(other, SpecialTokens::kAsText)), other);
}

TEST(TokenizerCut, KeepsTheFirstMergesThatOccurOftenEnough) {
  NEED_SOURCE();
  const auto fixed = static_cast<int64_t>(259 + kChatTokens.size());
  const int64_t often = merges_that_occur(5);
  EXPECT_LT(often, merges_that_occur(1));
  const Tokenizer all = cut(fixed + often, 5);
  const Tokenizer some = cut(fixed + often - 10, 5);
  EXPECT_TRUE(all.find(" whales").has_value());
  EXPECT_FALSE(all.find(" hydro").has_value());  // occurs once
  int32_t previous = -1;
  for (int32_t id = 259; id < fixed + often - static_cast<int64_t>(kChatTokens.size()); ++id) {
    const int32_t official = large().id_of(all.token_bytes(id));
    ASSERT_GT(official, previous);  // order of the source
    previous = official;
    if (id < some.vocab_size() - static_cast<int32_t>(kChatTokens.size())) {
      ASSERT_EQ(some.token_bytes(id), all.token_bytes(id));
    }
  }
}

TEST(TokenizerCut, IdsFollowTheDocumentedLayout) {
  NEED_SOURCE();
  const Tokenizer small = cut(300, 1);
  EXPECT_EQ(small.vocab_size(), 300);
  for (int32_t id = 0; id < 259; ++id) EXPECT_EQ(small.token_bytes(id), large().token_bytes(id));
  int32_t id = 300 - static_cast<int32_t>(kChatTokens.size());
  for (const std::string_view token : kChatTokens) {
    EXPECT_EQ(small.id_of(token), id++);
    EXPECT_EQ(small.encode(token, SpecialTokens::kRecognise).size(), 1u);
  }
  EXPECT_TRUE(small.is_added(0) && small.is_added(1) && small.is_added(2) && !small.is_added(3));
}

TEST(TokenizerCut, ImpossibleWishesAreErrors) {
  NEED_SOURCE();
  EXPECT_THROW(cut(260, 1), InputError);   // bytes and added tokens do not fit
  EXPECT_THROW(cut(8192, 5), InputError);  // too little text
  EXPECT_THROW(cutter().cut({300, 0, {"<nobody>"}}), InputError);
  EXPECT_THROW(TokenizerCutter("{}", "t"), InputError);
}

}  // namespace
}  // namespace hadal::text
