#include "ops/compressor/compress.h"

#include <random>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

struct Sequence {
  at::Tensor kv, gate, ape;
  int64_t ratio, d;
};

Sequence make_sequence(int64_t ratio, int64_t tokens, int64_t d, at::ScalarType type = at::kFloat) {
  at::manual_seed(7);
  const int64_t width = ratio == 4 ? 2 * d : d;
  return {.kv = at::randn({tokens, width}).to(type),
          .gate = (at::randn({tokens, width}) * 2.0).to(type),
          .ape = at::randn({ratio, width}).to(type),
          .ratio = ratio,
          .d = d};
}

at::Tensor one_shot(const Sequence& s) {
  const Batch batch({s.kv.size(0)}, {0}, at::kCPU);
  return compress(s.kv, s.gate, s.ape, {}, {}, batch, s.ratio).pooled;
}

/// The same sequence in chunks, with rings of `ring` rows kept by position as a cache keeps them.
at::Tensor in_chunks(const Sequence& s, const std::vector<int64_t>& lengths, int64_t ring) {
  RingView kv = RingView::of_slots(at::full({ring, s.kv.size(1)}, NAN, s.kv.options()), {0}, ring);
  RingView score = kv;
  score.rows = kv.rows.clone();
  std::vector<at::Tensor> pooled;
  int64_t start = 0;
  for (const int64_t length : lengths) {
    const Batch batch({length}, {start}, at::kCPU);
    const Compressed step = compress(s.kv.narrow(0, start, length), s.gate.narrow(0, start, length),
                                     s.ape, kv, score, batch, s.ratio);
    pooled.push_back(step.pooled);
    for (int64_t t = 0; t < length; ++t) {
      kv.rows[(start + t) % ring].copy_(s.kv[start + t]);
      score.rows[(start + t) % ring].copy_(step.score[t]);
    }
    start += length;
  }
  return at::cat(pooled);
}

/// model.md 7 by scalars in float64.
double expected_entry(const Sequence& s, int64_t block, int64_t channel) {
  const int64_t m = s.ratio;
  std::vector<std::pair<double, double>> candidates;  // score, value
  const auto add = [&](int64_t pos, int64_t column) {
    candidates.emplace_back(
        s.gate[pos][column].item<double>() + s.ape[pos % m][column].item<double>(),
        s.kv[pos][column].item<double>());
  };
  if (m == 4) {
    for (int64_t j = 0; block > 0 && j < m; ++j) add(m * (block - 1) + j, channel);
    for (int64_t j = 0; j < m; ++j) add(m * block + j, s.d + channel);
  } else {
    for (int64_t j = 0; j < m; ++j) add(m * block + j, channel);
  }
  double denominator = 0.0, numerator = 0.0;
  for (const auto& [score, value] : candidates) {
    denominator += std::exp(score);
    numerator += std::exp(score) * value;
  }
  return numerator / denominator;
}

class CompressRatio : public ::testing::TestWithParam<int64_t> {};

TEST_P(CompressRatio, IsTheFormula) {
  const Sequence s = make_sequence(GetParam(), 3 * GetParam() + 2, 5, at::kDouble);
  const at::Tensor pooled = one_shot(s);
  ASSERT_EQ(pooled.size(0), 3);
  for (int64_t block = 0; block < 3; ++block) {
    for (int64_t e = 0; e < 5; ++e) {
      EXPECT_NEAR(pooled[block][e].item<double>(), expected_entry(s, block, e), 1e-13);
    }
  }
}

// model.md 15: exact, for every way of cutting.
TEST_P(CompressRatio, EverySplitGivesTheSameBits) {
  const int64_t ratio = GetParam(), tokens = 5 * ratio + 3;
  const Sequence s = make_sequence(ratio, tokens, 19);
  const at::Tensor whole = one_shot(s);
  const int64_t ring = (ratio == 4 ? 2 : 1) * ratio;
  EXPECT_TRUE(testing::same_bits(
      in_chunks(s, std::vector<int64_t>(static_cast<size_t>(tokens), 1), ring), whole));
  for (int64_t split = 1; split < tokens; ++split) {
    ASSERT_TRUE(testing::same_bits(in_chunks(s, {split, tokens - split}, ring), whole)) << split;
  }
  std::mt19937 random(3);
  for (int trial = 0; trial < 20; ++trial) {
    std::vector<int64_t> lengths;
    for (int64_t left = tokens; left > 0; left -= lengths.back()) {
      lengths.push_back(std::min<int64_t>(left, 1 + static_cast<int64_t>(random() % 11)));
    }
    ASSERT_TRUE(testing::same_bits(in_chunks(s, lengths, ring + trial % 3), whole)) << trial;
  }
}

TEST_P(CompressRatio, NeighboursInABatchDoNotMatter) {
  const int64_t ratio = GetParam(), tokens = 2 * ratio + 1;
  const Sequence s = make_sequence(ratio, 3 * tokens, 6);
  const Batch batch({tokens, tokens, tokens}, {0, 0, 0}, at::kCPU);
  const at::Tensor together = compress(s.kv, s.gate, s.ape, {}, {}, batch, ratio).pooled;
  for (int64_t seq = 0; seq < 3; ++seq) {
    Sequence alone = s;
    alone.kv = s.kv.narrow(0, seq * tokens, tokens);
    alone.gate = s.gate.narrow(0, seq * tokens, tokens);
    EXPECT_TRUE(testing::same_bits(one_shot(alone), together.narrow(0, seq * 2, 2))) << seq;
  }
}

TEST_P(CompressRatio, KernelKeepsTheContract) {
  const int64_t ratio = GetParam();
  for (const int64_t d : {3, 16, 40}) {
    const Sequence s = make_sequence(ratio, 2 * ratio + 3, d);
    const auto call = [&](const std::vector<at::Tensor>& in) {
      const Batch batch({in[0].size(0)}, {0}, at::kCPU);
      const Compressed r = compress(in[0], in[1], in[2], {}, {}, batch, ratio);
      return std::vector{r.pooled, r.score};
    };
    const auto found = testing::expect_machine_independent(call, {s.kv, s.gate, s.ape});
    const auto exact = call({s.kv.to(at::kDouble), s.gate.to(at::kDouble), s.ape.to(at::kDouble)});
    EXPECT_LT((found[0] - exact[0]).abs().max().item<double>(), 2e-6);
    EXPECT_LT((found[1] - exact[1]).abs().max().item<double>(), 1e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Ratios, CompressRatio, ::testing::Values(4, 7, 16));

TEST(Compress, BlockZeroHasNoPreviousBlock) {
  // The first half of the columns belongs to the previous block: block 0 must not see its own.
  Sequence s = make_sequence(4, 8, 3);
  const at::Tensor before = one_shot(s);
  s.kv.narrow(0, 0, 4).narrow(1, 0, 3).fill_(1e6);
  const at::Tensor after = one_shot(s);
  EXPECT_TRUE(testing::same_bits(before[0], after[0]));
  EXPECT_FALSE(at::equal(before[1], after[1]));
}

TEST(Compress, TheApeShiftsScoresAndNotValues) {
  Sequence s = make_sequence(16, 32, 4);
  const at::Tensor before = one_shot(s);
  // One constant on every place of a channel is no change of its softmax.
  s.ape = s.ape + 3.0;
  EXPECT_LT((one_shot(s) - before).abs().max().item<double>(), 1e-5);
  // Dominated by one place, the block is that place's value.
  s.ape[5] += 200.0;
  EXPECT_LT((one_shot(s)[1] - s.kv[16 + 5]).abs().max().item<double>(), 1e-6);
}

TEST(Compress, EqualScoresAverage) {
  Sequence s = make_sequence(8, 8, 4, at::kDouble);
  s.gate.zero_();
  s.ape.zero_();
  EXPECT_LT((one_shot(s)[0] - s.kv.mean(0)).abs().max().item<double>(), 1e-14);
}

}  // namespace
}  // namespace hadal::ops
