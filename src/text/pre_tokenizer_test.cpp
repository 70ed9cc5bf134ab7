#include "text/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <random>

#include <gtest/gtest.h>
#include <pcre2.h>

#include "base/check.h"
#include "text/char_class.h"
#include "text/utf8.h"

namespace hadal::text {
namespace {

using Pieces = std::vector<std::string_view>;

const PreTokenizer& fast() {
  static const PreTokenizer instance(PreTokenizer::official_patterns());
  return instance;
}
const PreTokenizer& regular() {
  static const PreTokenizer instance(PreTokenizer::official_patterns(), /*use_fast_path=*/false);
  return instance;
}

/// Code points that PCRE2's Unicode version and ours put in the same class (theirs may be older).
std::vector<char32_t> agreed_code_points() {
  uint8_t theirs[256];
  const std::pair<const char*, uint8_t> classes[] = {{R"(\p{L})", kLetter},
                                                     {R"(\p{M})", kMark},
                                                     {R"(\p{N})", kNumber},
                                                     {R"([\p{P}\p{S}])", kSymbol}};
  std::vector<PreTokenizer> tests;
  for (const auto& entry : classes)
    tests.emplace_back(std::vector<std::string>{concat("x", entry.first)});
  std::vector<char32_t> agreed;
  const CharClassTable& table = CharClassTable::get();
  for (char32_t block = 0; block < 0x110000; block += 256) {
    std::fill(std::begin(theirs), std::end(theirs), uint8_t{0});
    for (uint32_t i = 0; i < 256; ++i) {
      std::string text = "x";
      append_utf8(text, block + i);
      text += 'y';  // cut off where the class matches
      for (size_t k = 0; k < tests.size(); ++k) {
        if (tests[k].split(text).size() == 2) theirs[i] |= classes[k].second;
      }
    }
    for (uint32_t i = 0; i < 256; ++i) {
      const char32_t code = block + i;
      const bool surrogate = code >= 0xD800 && code < 0xE000;
      const uint8_t categories = kLetter | kMark | kNumber | kSymbol;
      if (!surrogate && (table(code) & categories) == theirs[i]) agreed.push_back(code);
    }
    if (block == 0x3FF00) block = 0xDFF00;  // nothing is assigned in between
  }
  return agreed;
}

TEST(PreTokenizer, CutsAsTheOfficialExpressionsDo) {
  const auto check = [](std::string_view text, const Pieces& expected) {
    EXPECT_EQ(fast().split(text), expected) << text;
    EXPECT_EQ(regular().split(text), expected) << text;
  };
  check("", {});
  check("Hello world!", {"Hello", " world", "!"});
  check("a  b", {"a", " ", " b"});
  check("a \n\n  b", {"a", " \n\n", " ", " b"});
  check("12345 6", {"123", "45", " ", "6"});
  check("x = y;\n\nz", {"x", " =", " y", ";\n\n", "z"});
  check("don't", {"don", "'t"});
  check("\u4f60\u597d\uff0c\u4e16", {"\u4f60\u597d", "\uff0c", "\u4e16"});
  check("\u30ab\u30fb\u30ab", {"\u30ab", "\u30fb", "\u30ab"});
  check("end  ", {"end", "  "});
  check("  12", {"  ", "12"});  // the look-ahead sees the end of its segment, not the number
  check(
      "\x01\x02"
      "a",
      {"\x01",
       "\x02"
       "a"});
  check("e\u0301tude", {"e\u0301tude"});
}

TEST(PreTokenizer, FastPathEqualsTheExpressionsOnRandomUnicode) {
  const std::vector<char32_t> agreed = agreed_code_points();
  ASSERT_GT(agreed.size(), 250000u);
  const std::u32string corners =
      U" \t\n\r\v\f\u0085\u00a0\u180e\u2028\u3000aZ\u00e9\u0301'!.<_-19\u0664\u4f60\u3040\u3042"
      U"\u30a2\u30fb\u3099\u30ff\u3100\u9fa5\u9fa6\u0001\U0001f600\ue000\u0378";
  std::mt19937 random(11);
  for (int round = 0; round < 40000; ++round) {
    std::string text;
    for (size_t n = random() % 40; n > 0; --n) {
      append_utf8(text, random() % 4 != 0 ? corners[random() % corners.size()]
                                          : agreed[random() % agreed.size()]);
    }
    ASSERT_EQ(fast().split(text), regular().split(text)) << text;
  }
  // Every agreed code point between letters, digits and spaces.
  std::string all;
  for (size_t i = 0; i < agreed.size(); ++i) {
    append_utf8(all, agreed[i]);
    all += "a 1  \n"[i % 6];
  }
  EXPECT_EQ(fast().split(all), regular().split(all));
}

TEST(PreTokenizer, PiecesCoverTheText) {
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    std::string bytes;
    for (size_t n = random() % 200; n > 0; --n) bytes.push_back(static_cast<char>(random() % 256));
    const std::string text = repair_utf8(bytes);
    std::string joined;
    for (const std::string_view piece : fast().split(text)) {
      ASSERT_FALSE(piece.empty());
      joined += piece;
    }
    ASSERT_EQ(joined, text);
  }
}

TEST(PreTokenizer, OtherExpressionsRunOnPcre2) {
  const PreTokenizer words({"[a-z]+", "[aeiou]"});
  EXPECT_FALSE(words.is_official());
  EXPECT_EQ(words.split("hello you"), (Pieces{"h", "e", "ll", "o", " ", "y", "o", "u"}));
  const PreTokenizer empty({"x*"});
  EXPECT_EQ(empty.split("axxb\u00e9"), (Pieces{"a", "xx", "b\u00e9"}));
  EXPECT_THROW(PreTokenizer({"[a-"}), InputError);
}

}  // namespace
}  // namespace hadal::text
