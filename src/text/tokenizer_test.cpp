#include "text/tokenizer.h"

#include <algorithm>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <thread>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/thread_time.h"
#include "text/tokenizer_file.h"

namespace hadal::text {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<int32_t>;
constexpr auto kRecognise = SpecialTokens::kRecognise;
constexpr auto kAsText = SpecialTokens::kAsText;

const std::string kOfficialFolder = HADAL_SOURCE_DIR "/../shared/data/deepseek-v4-tokenizer";

const Tokenizer* official() {
  static const std::optional<Tokenizer> instance = []() -> std::optional<Tokenizer> {
    const std::string path = kOfficialFolder + "/tokenizer.json";
    if (!std::filesystem::exists(path)) return std::nullopt;
    return Tokenizer::from_file(path);
  }();
  return instance ? &*instance : nullptr;
}

#define NEED_OFFICIAL()                                                     \
  if (official() == nullptr) GTEST_SKIP() << "absent: " << kOfficialFolder; \
  const Tokenizer& tokenizer = *official()

/// Bytes, the merges "t h", "th e", "a a" and three added tokens; no data needed.
Json small_file() {
  Json file;
  file["added_tokens"] = Json::array();
  Json& vocab = file["model"]["vocab"];
  for (int byte = 0; byte < 256; ++byte) vocab[byte_alphabet()[static_cast<size_t>(byte)]] = byte;
  vocab["th"] = 256;
  vocab["the"] = 257;
  vocab["aa"] = 258;
  file["model"]["type"] = "BPE";
  file["model"]["merges"] = {"t h", "th e", "a a"};
  int id = 259;
  for (const char* content : {"<s>", "<s>x", "<think>"}) {
    file["added_tokens"].push_back({{"id", id++}, {"content", content}, {"special", id == 260}});
  }
  Json split = {{"type", "Split"}, {"pattern", {{"Regex", " ?[a-z]+"}}}, {"behavior", "Isolated"}};
  Json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  file["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {split, level}}};
  return file;
}

Tokenizer make(const Json& file) { return Tokenizer::from_json(file.dump(), "small.json"); }

TEST(Tokenizer, ReproducesEveryVector) {
  NEED_OFFICIAL();
  EXPECT_EQ(tokenizer.vocab_size(), 129280);
  std::ifstream lines(kOfficialFolder + "/golden_encode.jsonl");
  std::string line;
  int count = 0;
  while (std::getline(lines, line)) {
    const Json vector = Json::parse(line);
    const std::string text = vector["text"];
    const Ids ids = vector["ids"].get<Ids>();
    ASSERT_EQ(tokenizer.encode(text, kRecognise), ids) << text;
    ASSERT_EQ(tokenizer.encode(text, std::span<const TextRange>()), ids) << text;
    ASSERT_EQ(tokenizer.decode(ids), text);
    DecodeStream stream(tokenizer);
    std::string streamed;
    for (const int32_t id : ids) {
      const std::string piece = stream.push(id);
      ASSERT_EQ(valid_utf8_prefix(piece), piece.size());
      streamed += piece;
    }
    ASSERT_EQ(streamed + stream.flush(), text);
    ASSERT_EQ(tokenizer.decode(tokenizer.encode(text, kAsText)), text);
    ++count;
  }
  EXPECT_EQ(count, 688);
}

TEST(Tokenizer, SpecialIdsAreTheOfficialOnes) {
  NEED_OFFICIAL();
  const std::pair<const char*, int32_t> expected[] = {
      {"<\uff5cbegin\u2581of\u2581sentence\uff5c>", 0},
      {"<\uff5cend\u2581of\u2581sentence\uff5c>", 1},
      {"<\uff5cUser\uff5c>", 128803},
      {"<\uff5cAssistant\uff5c>", 128804},
      {"<think>", 128821},
      {"</think>", 128822},
      {"\uff5cDSML\uff5c", 128825},
      {"<\uff5caction\uff5c>", 128829}};
  for (const auto& [content, id] : expected) {
    EXPECT_EQ(tokenizer.id_of(content), id);
    EXPECT_TRUE(tokenizer.is_added(id));
    EXPECT_EQ(tokenizer.encode(content, kRecognise), Ids{id});
    const Ids as_text = tokenizer.encode(content, kAsText);
    EXPECT_TRUE(std::none_of(as_text.begin(), as_text.end(),
                             [&](int32_t i) { return tokenizer.is_added(i); }));
    EXPECT_EQ(tokenizer.decode(as_text), content);
  }
}

TEST(Tokenizer, ManyThreadsGiveTheSameIds) {
  NEED_OFFICIAL();
  std::string text;
  std::mt19937 random(5);
  for (int i = 0; i < 20000; ++i)
    text += concat(i % 7 == 0 ? "Word" : " w", random() % 3000, i % 50 == 0 ? "\n\n" : "");
  const Ids expected = tokenizer.encode(text, kRecognise);
  std::vector<Ids> found(4);
  {
    std::vector<std::jthread> threads;
    for (Ids& ids : found) threads.emplace_back([&] { ids = tokenizer.encode(text, kRecognise); });
  }
  for (const Ids& ids : found) EXPECT_EQ(ids, expected);
}

/// Processor seconds of one encode in this thread, the least of `tries`; its ids must spell `word`.
double encode_seconds(const Tokenizer& tokenizer, const std::string& word, int tries) {
  const auto now = [] { return std::chrono::duration<double>(thread_time()).count(); };
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < tries; ++i) {
    const double start = now();
    const Ids ids = tokenizer.encode(word, kRecognise);
    least = std::min(least, now() - start);
    EXPECT_EQ(tokenizer.decode(ids), word);
  }
  return least;
}

TEST(Tokenizer, OneLongWordIsNotQuadratic) {
  NEED_OFFICIAL();
  std::string word;
  std::mt19937 random(9);
  while (word.size() < 800'000) word.push_back(static_cast<char>('a' + random() % 26));
  // 16 times the letters: about 20 times the work where it is n log n, 256 times where quadratic.
  const double shorter = encode_seconds(tokenizer, word.substr(0, 50'000), 3);
  EXPECT_LT(encode_seconds(tokenizer, word, 3), 100 * shorter);
  encode_seconds(tokenizer, std::string(800'000, 'a'), 1);
}

TEST(Tokenizer, MergesInOrderOfRankLeftmostFirst) {
  const Tokenizer tokenizer = make(small_file());
  EXPECT_FALSE(tokenizer.encode("the", kRecognise).empty());
  EXPECT_EQ(tokenizer.encode("the", kRecognise), Ids{257});
  EXPECT_EQ(tokenizer.encode("aaa", kRecognise), (Ids{258, 'a'}));
  EXPECT_EQ(tokenizer.encode("tthh", kRecognise), (Ids{'t', 256, 'h'}));
  EXPECT_EQ(tokenizer.encode("", kRecognise), Ids{});
}

TEST(Tokenizer, AddedTokensAreTheLongestMatchAndOnlyWhereAsked) {
  const Tokenizer tokenizer = make(small_file());
  // <s> is not normalised, so it is cut out before <s>x can match.
  EXPECT_EQ(tokenizer.encode("<s>x", kRecognise), (Ids{259, 'x'}));
  EXPECT_EQ(tokenizer.encode("a<think>the", kRecognise), (Ids{'a', 261, 257}));
  EXPECT_EQ(tokenizer.encode("<s>", kAsText), (Ids{'<', 's', '>'}));
  Json both = small_file();
  for (Json& token : both["added_tokens"]) token["normalized"] = false;
  EXPECT_EQ(make(both).encode("<s>x<s>", kRecognise), (Ids{260, 259}));
}

TEST(Tokenizer, RangesOfUserTextHoldNoAddedTokens) {
  const Tokenizer tokenizer = make(small_file());
  const std::string text = "<s>the<s><think>th<think>e";
  const auto encode = [&](std::vector<TextRange> ranges) { return tokenizer.encode(text, ranges); };
  EXPECT_EQ(encode({}), tokenizer.encode(text, kRecognise));
  EXPECT_EQ(encode({{0, text.size()}}), tokenizer.encode(text, kAsText));
  EXPECT_EQ(encode({{6, 9}}), (Ids{259, 257, '<', 's', '>', 261, 256, 261, 'e'}));
  // A token that begins outside and ends inside a range is text, too; an empty range cuts as well.
  EXPECT_EQ(encode({{6, 10}}),
            (Ids{259, 257, '<', 's', '>', '<', 256, 'i', 'n', 'k', '>', 256, 261, 'e'}));
  EXPECT_EQ(encode({{1, 1}, {6, 9}}).front(), '<');
  // Ranges change nothing where no token stands.
  const std::string plain = "the aaa the";
  for (size_t begin = 0; begin <= plain.size(); ++begin) {
    for (size_t end = begin; end <= plain.size(); ++end) {
      const std::vector<TextRange> range = {{begin, end}};
      ASSERT_EQ(tokenizer.encode(plain, range), tokenizer.encode(plain, kAsText));
    }
  }
  EXPECT_THROW(tokenizer.encode("\xFF", std::vector<TextRange>{}), InputError);
}

TEST(Tokenizer, InvalidBytesBecomeReplacementCharactersFirst) {
  const Tokenizer tokenizer = make(small_file());
  EXPECT_EQ(tokenizer.decode(tokenizer.encode("a\xFF\xE1\x80z", kRecognise)), "a\uFFFD\uFFFDz");
  // Tokens may end inside a character; decoding never does.
  EXPECT_EQ(tokenizer.decode(Ids{0xE4, 0xBD, 'x'}), "\uFFFDx");
  DecodeStream stream(tokenizer);
  EXPECT_EQ(stream.push(0xE4), "");
  EXPECT_EQ(stream.push(0xBD), "");
  EXPECT_EQ(stream.push(0xA0), "\u4f60");
  EXPECT_EQ(stream.push(0xE4), "");
  EXPECT_EQ(stream.flush(), "\uFFFD");
}

TEST(Tokenizer, LongAndShortPiecesAgree) {
  // Both merging loops on the same bytes: a long piece whose halves cannot merge across the seam.
  const Tokenizer tokenizer = make(small_file());
  std::mt19937 random(13);
  for (int round = 0; round < 300; ++round) {
    std::string half;
    for (int i = 0; i < 20; ++i) half += "theaxthaa"[random() % 9];
    const Ids part = tokenizer.encode(half + "z", kRecognise);
    Ids expected;
    std::string whole;
    for (int i = 0; i < 5; ++i) {
      whole += half + "z";
      expected.insert(expected.end(), part.begin(), part.end());
    }
    ASSERT_EQ(tokenizer.encode(whole, kRecognise), expected) << half;
  }
}

TEST(Tokenizer, LookupsGoBothWays) {
  const Tokenizer tokenizer = make(small_file());
  EXPECT_EQ(tokenizer.vocab_size(), 262);
  for (int32_t id = 0; id < tokenizer.vocab_size(); ++id) {
    EXPECT_EQ(tokenizer.id_of(tokenizer.token_bytes(id)), id);
  }
  EXPECT_EQ(tokenizer.token_name(' '), "\u0120");
  EXPECT_FALSE(tokenizer.find("nothing").has_value());
  EXPECT_THROW(tokenizer.id_of("nothing"), InputError);
  EXPECT_THROW(tokenizer.token_bytes(262), InputError);
  EXPECT_THROW(tokenizer.decode(Ids{-1}), InputError);
}

/// The message of the InputError that reading gives.
std::string complaint(const std::string& json) {
  try {
    Tokenizer::from_json(json, "t.json");
  } catch (const InputError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Tokenizer, MalformedFilesAreNamed) {
  const auto expect = [](const std::string& json, const std::string& part) {
    const std::string message = complaint(json);
    EXPECT_NE(message.find(part), std::string::npos) << message << "\nexpected: " << part;
    EXPECT_EQ(message.rfind("t.json: ", 0), 0u) << message;
  };
  const auto broken = [&](const std::string& pointer, const Json& value, const std::string& part) {
    Json file = small_file();
    file[Json::json_pointer(pointer)] = value;
    expect(file.dump(), part);
  };
  expect("{", "not JSON");
  expect("[]", "expected an object");
  expect("{}", "no 'model'");
  broken("/model/type", "Unigram", "model.type is 'Unigram', expected BPE");
  broken("/model/vocab", Json::array(), "model.vocab is array");
  broken("/model/vocab/the", 256, "id 256 belongs to both 'th' and 'the'");
  broken("/model/vocab/the", -1, "expected 0 to");
  broken("/model/vocab/the", 1e300, "expected an integer");
  broken("/model/vocab/the", uint64_t{1} << 60, "expected 0 to");
  broken("/model/vocab/the", 400, "id 257 has no token");
  broken("/model/vocab/\u4f60", 262, "byte alphabet");
  broken("/model/merges/0", "t q", "merge 0 refers to 'tq'");
  broken("/model/merges/0", "zz h", "merge 0 refers to 'zz'");
  broken("/model/merges/0", "th", "expected two tokens");
  broken("/model/merges/0", 7, "expected two tokens");
  broken("/model/byte_fallback", true, "byte_fallback");
  broken("/model/unk_token", "<unk>", "unk_token");
  broken("/normalizer", Json{{"type", "NFC"}}, "normalizer 'NFC' is not supported");
  broken("/pre_tokenizer", Json{{"type", "Whitespace"}}, "pre_tokenizer 'Whitespace'");
  broken("/pre_tokenizer/pretokenizers/0/behavior", "Removed", "behavior 'Removed'");
  broken("/pre_tokenizer/pretokenizers/0/type", "Digits", "expected Split");
  broken("/pre_tokenizer/pretokenizers/0/invert", true, "invert");
  broken("/pre_tokenizer/pretokenizers/1/use_regex", true, "use_regex");
  broken("/added_tokens/0/id", 5, "belongs to both");
  broken("/added_tokens/0/content", "", "empty content");
  broken("/added_tokens/0/content", "<think>", "appears twice");
  broken("/added_tokens/0/content", "th", "but model.vocab says 256");
  broken("/added_tokens/0/lstrip", true, "lstrip is not supported");
  broken("/post_processor", Json{{"type", "TemplateProcessing"}}, "post_processor");
  Json missing = small_file();
  missing["model"]["vocab"].erase("q");
  missing["model"]["vocab"]["ab"] = 'q';
  expect(missing.dump(), "no token for byte 113");
  Json twice = small_file();
  twice["model"]["merges"].push_back("t h");
  expect(twice.dump(), "same pair");
  Json regex = small_file();
  regex["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(";
  expect(regex.dump(), "expression '('");
  EXPECT_THROW(Tokenizer::from_file("/nonexistent/tokenizer.json"), InputError);
}

}  // namespace
}  // namespace hadal::text
