#include "train/row_plan.h"

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <map>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "base/philox.h"
#include "testing/tiny_tokenizer.h"
#include "text/tokenizer.h"

namespace hadal::train {
namespace {

/// Two text sources and one of conversations, and stages that go over them more than once.
class RowPlanTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = ::testing::TempDir() + "hadal-plan-XXXXXX";
    folder_ = mkdtemp(name.data());
    write_file_atomic(folder_ + "/tokenizer.json", testing::byte_tokenizer_json());
    const Philox random(5, 0);
    std::string lines;
    for (uint64_t i = 0; i < 60; ++i) {
      // Most documents are short, some longer than three rows.
      const double length = std::exp(2.0 + 4.0 * random.uniform(i));
      lines += concat(R"({"text": ")",
                      std::string(static_cast<size_t>(length), static_cast<char>('a' + i % 26)),
                      "\"}\n");
    }
    write_file_atomic(folder_ + "/a.jsonl", lines);
    write_file_atomic(folder_ + "/b.txt", std::string(500, 'z'));
    std::string chats;
    for (int i = 0; i < 20; ++i) {
      chats += concat(R"({"messages": [{"role": "user", "content": "q)", i,
                      R"("}, {"role": "assistant", "content": ")",
                      std::string(static_cast<size_t>(3 * i), 'y'), "\"}]}\n");
    }
    write_file_atomic(folder_ + "/chat.jsonl", chats);
    write_file_atomic(folder_ + "/run.json", R"({
      "model": "config.json", "tokenizer": "tokenizer.json", "out": "out", "seed": 9,
      "sources": [{"name": "a", "files": ["a.jsonl"]}, {"name": "b", "files": ["b.txt"]},
        {"name": "chat", "kind": "conversations", "files": ["chat.jsonl"]}],
      "stages": [
        {"name": "one", "tokens": 3000, "row_length": 64, "attention": "dense",
          "mix": {"a": 3, "b": 1}},
        {"name": "two", "tokens": 9000, "row_length": 128, "attention": "sparse",
          "mix": {"a": 8, "chat": 1, "b": 0}}],
      "learning_rate": {"peak": 0.01}, "batch": [{"tokens": 256}]})");
    config_ = load_run_config(folder_ + "/run.json");
    sources_ = open_sources(config_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::string folder_;
  RunConfig config_;
  std::vector<data::TokenShards> sources_;
};

bool same_rows(const PackedRows& a, const PackedRows& b) {
  return a.rows == b.rows && a.row_length == b.row_length && a.tokens == b.tokens &&
         a.scored == b.scored && a.sample_lengths == b.sample_lengths;
}

TEST_F(RowPlanTest, RowsAreAFunctionOfTheConfigurationAndAnyCutOfThem) {
  const RowPlan plan(config_, sources_), again(config_, sources_);
  EXPECT_EQ(plan.total_tokens(), 64 * plan.num_rows(0) + 128 * plan.num_rows(1));
  EXPECT_EQ(plan.tokens_before(1, 2), 64 * plan.num_rows(0) + 256);
  for (size_t stage = 0; stage < 2; ++stage) {
    ASSERT_EQ(plan.num_rows(stage), again.num_rows(stage));
    EXPECT_EQ(plan.fingerprint(stage), again.fingerprint(stage));
    const PackedRows whole = plan.rows(stage, 0, plan.num_rows(stage));
    // Another process that goes on at any row sees what this one would have seen.
    std::vector<int32_t> tokens;
    for (int64_t row = 0; row < again.num_rows(stage); ++row) {
      const PackedRows one = again.rows(stage, row, 1);
      tokens.insert(tokens.end(), one.tokens.begin(), one.tokens.end());
    }
    EXPECT_EQ(tokens, whole.tokens);
    EXPECT_TRUE(same_rows(whole, again.rows(stage, 0, again.num_rows(stage))));
  }
  EXPECT_THROW(plan.rows(0, plan.num_rows(0), 1), Error);
  RunConfig other = config_;
  other.seed = 10;
  EXPECT_NE(RowPlan(other, sources_).fingerprint(0), plan.fingerprint(0));
  other = config_;
  other.stages[1].tokens += 500;
  EXPECT_EQ(RowPlan(other, sources_).fingerprint(0), plan.fingerprint(0)) << "a later stage";
  EXPECT_NE(RowPlan(other, sources_).fingerprint(1), plan.fingerprint(1));
}

TEST_F(RowPlanTest, EveryPieceIsThereOnceAndMixturesHold) {
  const RowPlan plan(config_, sources_);
  // 'z' is written by source b alone; padding is unscored, BOS and EOS are not.
  const PackedRows one = plan.rows(0, 0, plan.num_rows(0));
  int64_t scored = 0, from_b = 0;
  for (size_t i = 0; i < one.tokens.size(); ++i) {
    scored += one.scored[i];
    if (one.scored[i] != 0 && one.tokens[i] == 3 + 'z') ++from_b;
  }
  EXPECT_EQ(scored, 3000) << "text sources split, so a stage gets exactly its tokens";
  // 750 tokens of b: one pass of 502 and 248 of the next, a BOS each and one EOS. 'z' of source a
  // (documents 25 and 51) comes on top.
  EXPECT_GE(from_b, 747);
  int64_t total = 0;
  for (const int64_t length : one.sample_lengths) total += length;
  EXPECT_EQ(total, static_cast<int64_t>(one.tokens.size()));

  // The second stage goes on where the first stopped: together they are a stream of passes.
  std::map<int32_t, int64_t> histogram;
  for (size_t stage = 0; stage < 2; ++stage) {
    const PackedRows rows = plan.rows(stage, 0, plan.num_rows(stage));
    for (size_t i = 0; i < rows.tokens.size(); ++i) {
      if (rows.scored[i] != 0) ++histogram[rows.tokens[i]];
    }
  }
  const double passes =
      (3000 * 0.75 + 9000 * 8.0 / 9.0) / static_cast<double>(sources_[0].num_tokens());
  EXPECT_GT(passes, 1.2) << "the test wants repetition";
  std::map<int32_t, int64_t> once;
  for (int64_t document = 0; document < sources_[0].num_documents(); ++document) {
    for (const int32_t id : sources_[0].document(document)) ++once[id];
  }
  for (const auto& [id, count] : once) {
    // 'y' and 'q' are in conversations and 'z' in b; BOS and EOS are everywhere.
    if (id <= 1 || id == 3 + 'y' || id == 3 + 'q' || id == 3 + 'z') continue;
    EXPECT_GE(histogram[id], static_cast<int64_t>(std::floor(passes)) * count) << id;
    EXPECT_LE(histogram[id], static_cast<int64_t>(std::ceil(passes)) * count) << id;
  }
}

TEST_F(RowPlanTest, NoLabelCrossesASampleAndPaddingHasNone) {
  const RowPlan plan(config_, sources_);
  const PackedRows rows = plan.rows(1, 0, plan.num_rows(1));
  const MicroBatch micro(rows, at::Device(at::kCPU));
  const auto* targets = micro.targets.const_data_ptr<int64_t>();
  const auto* mtp = micro.mtp_targets.const_data_ptr<int64_t>();
  size_t begin = 0;
  int64_t counted = 0, counted_mtp = 0;
  for (const int64_t length : rows.sample_lengths) {
    EXPECT_EQ(begin / 128, (begin + static_cast<size_t>(length) - 1) / 128);
    const size_t end = begin + static_cast<size_t>(length);
    for (size_t t = begin; t < end; ++t) {
      const bool next = t + 1 < end && rows.scored[t + 1] != 0;
      const bool after = t + 2 < end && rows.scored[t + 2] != 0;
      ASSERT_EQ(targets[t], next ? rows.tokens[t + 1] : -1) << t;
      ASSERT_EQ(mtp[t], after ? rows.tokens[t + 2] : -1) << t;
      counted += next ? 1 : 0;
      counted_mtp += after ? 1 : 0;
    }
    begin = end;
  }
  EXPECT_EQ(micro.num_targets, counted);
  EXPECT_EQ(micro.num_mtp_targets, counted_mtp);
  EXPECT_GT(counted, 0);
}

TEST_F(RowPlanTest, BestFitCutsNoMoreThanConcatenation) {
  for (const int64_t row_length : {16, 64, 200}) {
    data::DocumentStream stream(sources_[0], 0, 1, /*splits=*/true);
    std::vector<data::Piece> pieces;
    stream.take(sources_[0].num_tokens(), row_length, pieces);
    const std::vector<data::Row> rows = data::pack_best_fit(pieces, row_length);
    // Places where a document is cut: every piece but the last of each.
    const auto cuts = static_cast<int64_t>(pieces.size()) - sources_[0].num_documents();
    int64_t position = 0, concatenated = 0, documents_cut = 0, short_cut = 0;
    for (int64_t document = 0; document < sources_[0].num_documents(); ++document) {
      const auto size = static_cast<int64_t>(sources_[0].document(document).size());
      const int64_t boundaries = (position + size - 1) / row_length - position / row_length;
      concatenated += boundaries;
      if (boundaries > 0) ++documents_cut;
      if (boundaries > 0 && size <= row_length) ++short_cut;
      position += size;
    }
    EXPECT_LE(cuts, concatenated) << row_length;
    EXPECT_GT(short_cut, 0) << "concatenation cuts documents that fit a row; best fit none";
    for (const data::Piece& piece : pieces) {
      const auto size = static_cast<int64_t>(sources_[0].document(piece.document).size());
      EXPECT_TRUE(size > row_length || piece.length == size);
    }
    // And it pays little padding for that.
    const double used = static_cast<double>(sources_[0].num_tokens()) /
                        static_cast<double>(static_cast<int64_t>(rows.size()) * row_length);
    std::printf("rows of %3lld: %lld cuts, concatenation %lld (%lld documents); %.1f %% used\n",
                static_cast<long long>(row_length), static_cast<long long>(cuts),
                static_cast<long long>(concatenated), static_cast<long long>(documents_cut),
                100.0 * used);
    EXPECT_GT(used, 0.9);
  }
}

TEST_F(RowPlanTest, ValidationRowsAreTheSameForEverySeed) {
  const PackedRows first = validation_rows(sources_[0], true, 4, 64);
  EXPECT_EQ(first.rows, 4);
  EXPECT_EQ(first.tokens.size(), 256U);
  EXPECT_TRUE(same_rows(first, validation_rows(sources_[0], true, 4, 64)));
}

}  // namespace
}  // namespace hadal::train
