// Fill in the middle and split tokens: what they keep, how often they happen, and that they depend
// on the seed, the document's number and its text alone.
#include "data/text_transforms.h"

#include <algorithm>
#include <cmath>
#include <string>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "base/philox.h"
#include "testing/tiny_tokenizer.h"
#include "text/chat_tokens.h"
#include "text/utf8.h"

namespace hadal::data {
namespace {

text::Tokenizer with_marks() {
  return text::Tokenizer::from_json(
      testing::byte_tokenizer_json(
          {std::string(kFimBegin), std::string(kFimHole), std::string(kFimEnd)}),
      "with marks");
}

/// Document `number`: up to 60 characters of one to three bytes.
std::string some_text(int64_t number) {
  const Philox random(7, static_cast<uint64_t>(number));
  std::string text;
  const auto count = static_cast<uint64_t>(random.uniform(0) * 60);
  for (uint64_t i = 1; i <= count; ++i) {
    constexpr const char* kCharacters[] = {"a", "z", " ", "\n", ".", "é", "語", "ß"};
    text += kCharacters[static_cast<size_t>(random.uniform(i) * 8)];
  }
  return text;
}

/// The three parts between the marks; the whole text where there are none.
std::vector<std::string> parts_of(const text::Tokenizer& tokenizer,
                                  const std::vector<int32_t>& ids) {
  std::vector<std::vector<int32_t>> parts(1);
  for (size_t i = 1; i + 1 < ids.size(); ++i) {
    const bool mark = ids[i] == tokenizer.id_of(kFimBegin) || ids[i] == tokenizer.id_of(kFimHole) ||
                      ids[i] == tokenizer.id_of(kFimEnd);
    if (mark) {
      parts.emplace_back();
    } else {
      parts.back().push_back(ids[i]);
    }
  }
  std::vector<std::string> texts;
  for (const auto& part : parts) texts.push_back(tokenizer.decode(part));
  return texts;
}

TEST(TextTransforms, APrefixAMiddleAndASuffixAreTheDocument) {
  const text::Tokenizer tokenizer = with_marks();
  const DocumentEncoder encoder(tokenizer, {.fim_rate = 0.5, .seed = 3});
  int64_t rearranged = 0;
  for (int64_t number = 0; number < 2000; ++number) {
    const std::string text = some_text(number);
    const std::vector<int32_t> ids = encoder.encode(text, number);
    ASSERT_EQ(ids.front(), tokenizer.id_of(text::kBos));
    ASSERT_EQ(ids.back(), tokenizer.id_of(text::kEos));
    const std::vector<std::string> parts = parts_of(tokenizer, ids);
    if (parts.size() == 1) {
      ASSERT_EQ(parts[0], text);
      continue;
    }
    ++rearranged;
    ASSERT_EQ(parts.size(), 4U) << number;
    EXPECT_EQ(parts[0], "");
    EXPECT_EQ(ids[1], tokenizer.id_of(kFimBegin));
    EXPECT_EQ(parts[1] + parts[3] + parts[2], text) << number;
    for (const std::string& part : parts) EXPECT_EQ(text::valid_utf8_prefix(part), part.size());
  }
  EXPECT_GT(rearranged, 800);
}

TEST(TextTransforms, AsManyDocumentsAreRearrangedAsAsked) {
  const text::Tokenizer tokenizer = with_marks();
  constexpr int64_t kDocuments = 20'000;
  for (const double rate : {0.1, 1.0}) {
    const DocumentEncoder encoder(tokenizer, {.fim_rate = rate, .seed = 11});
    int64_t chosen = 0;
    for (int64_t number = 0; number < kDocuments; ++number)
      chosen += encoder.middle_of("some text", number).chosen ? 1 : 0;
    const double deviation = std::sqrt(rate * (1 - rate) / kDocuments);
    EXPECT_NEAR(static_cast<double>(chosen) / kDocuments, rate, 4 * deviation) << rate;
  }
  const DocumentEncoder never(tokenizer, {});
  EXPECT_FALSE(never.middle_of("some text", 1).chosen);
}

TEST(TextTransforms, ADocumentDependsOnSeedNumberAndText) {
  const text::Tokenizer tokenizer = with_marks();
  const TextTransforms transforms{.fim_rate = 1.0, .seed = 5};
  const DocumentEncoder encoder(tokenizer, transforms), again(tokenizer, transforms),
      other(tokenizer, {.fim_rate = 1.0, .seed = 6});
  const std::string text(200, 'x');
  EXPECT_EQ(encoder.encode(text, 4), again.encode(text, 4));
  EXPECT_NE(encoder.encode(text, 4), encoder.encode(text, 5));
  EXPECT_NE(encoder.encode(text, 4), other.encode(text, 4));
}

TEST(TextTransforms, ATokenizerWithoutMarksIsNamed) {
  const text::Tokenizer tokenizer =
      text::Tokenizer::from_json(testing::byte_tokenizer_json(), "plain");
  try {
    const DocumentEncoder encoder(tokenizer, {.fim_rate = 0.1});
    FAIL() << "no error";
  } catch (const InputError& error) {
    EXPECT_NE(std::string(error.what()).find("the tokenizer has no token <｜fim▁begin｜>"),
              std::string::npos)
        << error.what();
  }
}

TEST(TextTransforms, TokensOfPunctuationAndLineBreaksAreSplit) {
  const std::string path = concat(HADAL_SOURCE_DIR, "/models/hadal-nano/tokenizer.json");
  const text::Tokenizer tokenizer = text::Tokenizer::from_file(path);
  std::string text;
  for (int i = 0; i < 3000; ++i) text += i % 3 == 0 ? "It was late.\n" : "\"Who?\"\n\n";
  const DocumentEncoder whole(tokenizer, {}), some(tokenizer, {.split_rate = 0.1}),
      all(tokenizer, {.split_rate = 1.0});
  const std::vector<int32_t> fused = all.fused_tokens();
  const auto is_fused = [&](int32_t id) {
    return std::binary_search(fused.begin(), fused.end(), id);
  };
  const auto count = [&](const std::vector<int32_t>& ids) {
    return std::count_if(ids.begin(), ids.end(), is_fused);
  };
  for (const int32_t id : fused) {
    const std::string_view bytes = tokenizer.token_bytes(id);
    EXPECT_TRUE(bytes.back() == '\n' || bytes.back() == '\r') << bytes;
  }
  const auto before = count(whole.encode(text, 0));
  ASSERT_GT(before, 2000);
  EXPECT_EQ(count(all.encode(text, 0)), 0);
  const double share =
      1.0 - static_cast<double>(count(some.encode(text, 0))) / static_cast<double>(before);
  EXPECT_NEAR(share, 0.1, 4 * std::sqrt(0.09 / static_cast<double>(before)));
  for (const DocumentEncoder* encoder : {&whole, &some, &all}) {
    std::vector<int32_t> ids = encoder->encode(text, 0);
    ids.erase(ids.begin());
    ids.pop_back();
    EXPECT_EQ(tokenizer.decode(ids), text);
  }
  EXPECT_TRUE(whole.fused_tokens().empty());
}

}  // namespace
}  // namespace hadal::data
