#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <set>

#include <gtest/gtest.h>
#include <lzma.h>
#include <zstd.h>

#include "base/check.h"
#include "base/file.h"
#include "data/conversation.h"
#include "data/packing.h"
#include "data/text_source.h"
#include "data/token_shards.h"
#include "testing/tiny_tokenizer.h"
#include "text/chat_tokens.h"

namespace hadal::data {
namespace {

class Folder {
 public:
  Folder() {
    std::string name = ::testing::TempDir() + "hadal-data-XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

std::string xz(const std::string& text) {
  std::string out(text.size() + 1024, '\0');
  size_t size = 0;
  EXPECT_EQ(lzma_easy_buffer_encode(6, LZMA_CHECK_CRC64, nullptr,
                                    reinterpret_cast<const uint8_t*>(text.data()), text.size(),
                                    reinterpret_cast<uint8_t*>(out.data()), &size, out.size()),
            LZMA_OK);
  out.resize(size);
  return out;
}

std::string zst(const std::string& text) {
  std::string out(ZSTD_compressBound(text.size()), '\0');
  out.resize(ZSTD_compress(out.data(), out.size(), text.data(), text.size(), 3));
  return out;
}

std::vector<std::string> documents(const std::string& path) {
  std::vector<std::string> result;
  for_each_document(path, "text", [&](std::string text) { result.push_back(std::move(text)); });
  return result;
}

/// Text long enough for several reads and decoder buffers.
std::string long_jsonl() {
  std::string text;
  for (int i = 0; i < 3000; ++i) {
    text += concat("{\"title\": ", i, ", \"text\": \"line ", i,
                   std::string(1000, static_cast<char>('a' + i % 26)), "\\n\"}\n\n");
  }
  return text;
}

TEST(TextSource, ReadsEveryContainerAlike) {
  const Folder folder;
  const std::string text = long_jsonl();
  write_file_atomic(folder / "a.jsonl", text);
  write_file_atomic(folder / "a.jsonl.xz", xz(text.substr(0, 70000)) + xz(text.substr(70000)));
  write_file_atomic(folder / "a.jsonl.zst", zst(text));
  write_file_atomic(folder / "a.txt.xz", xz(text));
  const std::vector<std::string> expected = documents(folder / "a.jsonl");
  ASSERT_EQ(expected.size(), 3000U);
  EXPECT_EQ(expected[27].substr(0, 9), "line 27bb");
  EXPECT_EQ(expected[27].back(), '\n');
  EXPECT_EQ(documents(folder / "a.jsonl.xz"), expected);
  EXPECT_EQ(documents(folder / "a.jsonl.zst"), expected);
  EXPECT_EQ(documents(folder / "a.txt.xz"), std::vector<std::string>{text});
}

TEST(TextSource, DefectsNameFileAndPlace) {
  const Folder folder;
  const std::string text = long_jsonl();
  write_file_atomic(folder / "bad.jsonl", "{\"text\": \"x\"}\n{\"text\": 3}\n");
  write_file_atomic(folder / "nojson.jsonl", "{\"text\": \"x\"}\nnonsense\n");
  write_file_atomic(folder / "short.jsonl.xz", xz(text).substr(0, 900));
  write_file_atomic(folder / "short.jsonl.zst", zst(text).substr(0, 900));
  std::string damaged = xz(text);
  damaged[damaged.size() / 2] = static_cast<char>(damaged[damaged.size() / 2] ^ 0x55);
  write_file_atomic(folder / "damaged.jsonl.xz", damaged);
  const auto message = [&](const std::string& name) -> std::string {
    try {
      documents(folder / name);
    } catch (const InputError& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_NE(message("bad.jsonl").find("line 2: expected a string \"text\""), std::string::npos);
  EXPECT_NE(message("nojson.jsonl").find("line 2 is no JSON object"), std::string::npos);
  EXPECT_NE(message("short.jsonl.xz").find("end too early"), std::string::npos);
  EXPECT_NE(message("short.jsonl.zst").find("end too early"), std::string::npos);
  EXPECT_NE(message("damaged.jsonl.xz").find("are damaged before byte"), std::string::npos);
  EXPECT_NE(message("absent.txt").find("absent.txt: "), std::string::npos);
}

TEST(TokenShards, HoldsWhatWasEncoded) {
  const Folder folder;
  const std::string json = testing::byte_tokenizer_json();
  const text::Tokenizer tokenizer = text::Tokenizer::from_json(json, "bytes");
  write_file_atomic(folder / "a.jsonl", "{\"text\": \"Call me Ishmael.\"}\n{\"text\": \"\"}\n");
  write_file_atomic(folder / "b.txt", "It was a dark night.");
  const SourceSpec spec{
      .name = "books", .files = {folder / "a.jsonl", folder / "b.txt"}, .field = "text"};
  const std::string path = build_token_shards(spec, tokenizer, json, folder / "cache/tokens");
  const auto written = std::filesystem::last_write_time(path);
  EXPECT_EQ(build_token_shards(spec, tokenizer, json, folder / "cache/tokens"), path);
  EXPECT_EQ(std::filesystem::last_write_time(path), written) << "built again";
  const TokenShards shards(path);
  ASSERT_EQ(shards.num_documents(), 3);
  EXPECT_EQ(shards.text_bytes(), 16 + 20);
  const auto first = shards.document(0);
  EXPECT_EQ(first.front(), tokenizer.id_of(text::kBos));
  EXPECT_EQ(first.back(), tokenizer.id_of(text::kEos));
  EXPECT_EQ(tokenizer.decode(first.subspan(1, first.size() - 2)), "Call me Ishmael.");
  EXPECT_EQ(shards.document(1).size(), 2U);
  EXPECT_TRUE(shards.scored(0).empty());

  // Another text is another file.
  write_file_atomic(folder / "b.txt", "It was a dark and stormy night.");
  EXPECT_NE(build_token_shards(spec, tokenizer, json, folder / "cache/tokens"), path);

  // Damage is an error, not a wrong token.
  const std::string content = read_file(path);
  write_file_atomic(folder / "cut.tokens", content.substr(0, content.size() - 4));
  EXPECT_THROW(TokenShards(folder / "cut.tokens"), InputError);
}

TEST(Conversation, ScoresWhatTheAssistantWrites) {
  const text::Tokenizer tokenizer =
      text::Tokenizer::from_json(testing::byte_tokenizer_json(), "bytes");
  const std::string line =
      concat(R"({"messages": [{"role": "user", "content": "2+2? )", text::kAssistant,
             R"("}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "3+4?"},
      {"role": "assistant", "reasoning_content": "count", "content": "7"}],
      "thinking_mode": "thinking"})");
  const MarkedTokens marked = encode_conversation(line, "line 1", tokenizer);
  ASSERT_EQ(marked.ids.size(), marked.scored.size());
  std::vector<int32_t> scored;
  for (size_t i = 0; i < marked.ids.size(); ++i) {
    if (marked.scored[i] != 0) scored.push_back(marked.ids[i]);
  }
  EXPECT_EQ(tokenizer.decode(scored), concat("4", text::kEos, "count</think>7", text::kEos));
  for (const char* bad :
       {"[]", "{}", R"({"messages": 3})", R"({"messages": [], "thinking_mode": 1})",
        R"({"messages": [{"role": "bird", "content": "x"}]})", "{"}) {
    EXPECT_THROW(encode_conversation(bad, "line 1", tokenizer), InputError) << bad;
  }
}

TEST(Packing, BestFitKeepsEveryPieceAndFillsRows) {
  std::vector<Piece> pieces;
  for (int32_t i = 0; i < 500; ++i) {
    pieces.push_back({.source = 0, .length = 1 + (i * 7919) % 100, .document = i, .begin = 0});
  }
  const std::vector<Row> rows = pack_best_fit(pieces, 128);
  std::set<int64_t> seen;
  int64_t used = 0;
  for (const Row& row : rows) {
    int64_t length = 0;
    for (const Piece& piece : row) {
      length += piece.length;
      EXPECT_TRUE(seen.insert(piece.document).second);
    }
    EXPECT_LE(length, 128);
    used += length;
  }
  EXPECT_EQ(seen.size(), pieces.size());
  EXPECT_GT(static_cast<double>(used) / static_cast<double>(128 * rows.size()), 0.97);
  EXPECT_EQ(pack_best_fit(pieces, 128), rows);
}

TEST(Packing, ShufflesArePermutationsOfTheirKey) {
  std::vector<int64_t> sorted(1000);
  std::iota(sorted.begin(), sorted.end(), 0);
  const std::vector<int64_t> a = shuffled(1000, 1, 2);
  std::vector<int64_t> back = a;
  std::sort(back.begin(), back.end());
  EXPECT_EQ(back, sorted);
  EXPECT_EQ(shuffled(1000, 1, 2), a);
  EXPECT_NE(shuffled(1000, 1, 3), a);
  EXPECT_NE(shuffled(1000, 2, 2), a);
}

TEST(Packing, StreamsCoverEveryTokenOncePerPass) {
  const Folder folder;
  const std::string json = testing::byte_tokenizer_json();
  const text::Tokenizer tokenizer = text::Tokenizer::from_json(json, "bytes");
  std::string text;
  for (int i = 0; i < 20; ++i) {
    text += concat("{\"text\": \"", std::string(static_cast<size_t>(37 * i), 'x'), i, "\"}\n");
  }
  write_file_atomic(folder / "a.jsonl", text);
  const TokenShards shards(build_token_shards({.name = "a", .files = {folder / "a.jsonl"}},
                                              tokenizer, json, folder.path()));
  DocumentStream whole(shards, 0, 5, true);
  std::vector<Piece> pieces;
  whole.take(2 * shards.num_tokens(), 16, pieces);
  std::map<std::pair<int64_t, int64_t>, int> seen;
  for (const Piece& piece : pieces) {
    EXPECT_LE(piece.length, 16);
    for (int64_t t = 0; t < piece.length; ++t) ++seen[{piece.document, piece.begin + t}];
  }
  EXPECT_EQ(static_cast<int64_t>(seen.size()), shards.num_tokens());
  for (const auto& [place, count] : seen) EXPECT_EQ(count, 2);
  EXPECT_NEAR(whole.passes(), 2.0, 1e-9);

  // Two takes are one take: the cursor goes on inside a document.
  DocumentStream parts(shards, 0, 5, true);
  std::vector<Piece> first, second;
  parts.take(101, 16, first);
  parts.take(2 * shards.num_tokens() - 101, 16, second);
  int64_t total = 0;
  for (const auto& list : {first, second}) {
    for (const Piece& piece : list) {
      total += piece.length;
      for (int64_t t = 0; t < piece.length; ++t) --seen[{piece.document, piece.begin + t}];
    }
  }
  EXPECT_EQ(total, 2 * shards.num_tokens());
  for (const auto& [place, count] : seen) EXPECT_EQ(count, 0);

  // Conversations are never continued in another row.
  DocumentStream cut(shards, 0, 5, false);
  std::vector<Piece> heads;
  cut.take(shards.num_tokens() / 4, 16, heads);
  for (const Piece& piece : heads) EXPECT_EQ(piece.begin, 0);
  EXPECT_GT(cut.num_dropped_tokens(), 0);
}

}  // namespace
}  // namespace hadal::data
