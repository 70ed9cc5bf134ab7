#include "text/utf8.h"

#include <random>
#include <vector>

#include <gtest/gtest.h>

namespace hadal::text {
namespace {

const std::string kBad = "\xEF\xBF\xBD";

TEST(Utf8, EveryCodePointRoundTrips) {
  for (char32_t code = 0; code <= 0x10FFFF; ++code) {
    if (code >= 0xD800 && code < 0xE000) continue;
    std::string text;
    append_utf8(text, code);
    const Utf8Char c = decode_utf8(text, 0);
    ASSERT_EQ(c.status, Utf8Status::kValid) << static_cast<uint32_t>(code);
    ASSERT_TRUE(c.code_point == code) << static_cast<uint32_t>(code);
    ASSERT_EQ(c.length, text.size());
    ASSERT_EQ(valid_utf8_prefix(text), text.size());
  }
}

TEST(Utf8, OneReplacementForEachMaximalSubpart) {
  // Unicode 16, table 3-8 and its neighbours 3-9 to 3-11.
  EXPECT_EQ(repair_utf8("\x61\xF1\x80\x80\xE1\x80\xC2\x62\x80\x63\x80\xBF\x64"),
            "a" + kBad + kBad + kBad + "b" + kBad + "c" + kBad + kBad + "d");
  EXPECT_EQ(repair_utf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"),
            kBad + kBad + kBad + kBad + kBad + kBad + kBad + kBad + "A");
  EXPECT_EQ(repair_utf8("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"),
            kBad + kBad + kBad + kBad + kBad + kBad + kBad + kBad + "A");
  EXPECT_EQ(repair_utf8("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"),
            kBad + kBad + kBad + kBad + kBad + "A" + kBad + kBad + "B");
  EXPECT_EQ(repair_utf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), kBad + kBad + kBad + kBad + "A");
}

TEST(Utf8, SurrogatesAndTooLargeValuesAreNotWritten) {
  std::string text;
  append_utf8(text, 0xD800);
  append_utf8(text, 0x110000);
  EXPECT_EQ(text, kBad + kBad);
}

TEST(Utf8, StreamEqualsWholeRepairForEveryCutting) {
  std::mt19937 random(7);
  // Bytes that start and continue characters, so that many sequences are nearly right.
  const std::string alphabet = "a\x80\xBF\xC2\xE0\xA0\xE1\xED\x9F\xEF\xF0\x90\xF4\x8F\xFF";
  for (int round = 0; round < 3000; ++round) {
    std::string bytes;
    for (size_t n = random() % 24; n > 0; --n) bytes += alphabet[random() % alphabet.size()];
    const std::string expected = repair_utf8(bytes);
    EXPECT_EQ(valid_utf8_prefix(expected), expected.size());
    Utf8Stream stream;
    std::string joined;
    for (size_t pos = 0; pos < bytes.size();) {
      const size_t n = random() % 4;
      const std::string piece = stream.push(std::string_view(bytes).substr(pos, n));
      ASSERT_EQ(valid_utf8_prefix(piece), piece.size());
      ASSERT_LE(stream.pending(), 3u);
      joined += piece;
      pos += n;
    }
    joined += stream.flush();
    ASSERT_EQ(joined, expected);
  }
}

}  // namespace
}  // namespace hadal::text
