#include "ops/sampling/sample.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <numeric>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/cpu.h"
#include "base/hash.h"
#include "base/philox.h"

namespace hadal::ops {
namespace {

TEST(Sample, GreedyTakesTheLowestOfEqual) {
  const std::vector<float> logits = {1.0f, 3.0f, NAN, 3.0f, 2.0f};
  EXPECT_EQ(sample_token(logits, {.temperature = 0.0}, 0), 1);
  EXPECT_THROW(sample_token(std::vector<float>{NAN}, {}, 0), Error);
}

// 40,000 draws against the softmax: chi-square with 4 degrees of freedom stays below its 0.1 %
// point.
TEST(Sample, FollowsTheDistribution) {
  const std::vector<float> logits = {0.0f, 1.0f, -1.0f, 2.0f, 0.5f};
  constexpr double kTemperature = 0.8;
  double total = 0.0;
  for (const float x : logits) total += std::exp(x / kTemperature);
  constexpr int kDraws = 40000;
  std::vector<int> counts(logits.size(), 0);
  for (int i = 0; i < kDraws; ++i) {
    ++counts[static_cast<size_t>(
        sample_token(logits, {.temperature = kTemperature, .seed = 5}, i))];
  }
  double chi_square = 0.0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double expected = kDraws * std::exp(logits[i] / kTemperature) / total;
    chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  EXPECT_LT(chi_square, 18.47);
}

TEST(Sample, TopPCutsTheTail) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f),
                                     std::log(0.05f)};
  std::vector<int> counts(4, 0);
  for (int i = 0; i < 2000; ++i) {
    ++counts[static_cast<size_t>(sample_token(logits, {.top_p = 0.7, .seed = 1}, i))];
  }
  EXPECT_GT(counts[0], 1100);
  EXPECT_GT(counts[1], 600);
  EXPECT_EQ(counts[2] + counts[3], 0);
}

TEST(Sample, DependsOnSeedAndPositionAlone) {
  const std::vector<float> logits(100, 0.0f);
  EXPECT_EQ(sample_token(logits, {.seed = 9}, 4), sample_token(logits, {.seed = 9}, 4));
  int equal = 0;
  for (int i = 0; i < 100; ++i) {
    equal += sample_token(logits, {.seed = 9}, i) == sample_token(logits, {.seed = 10}, i);
  }
  EXPECT_LT(equal, 12);
}

// What the first version chose: texts recorded with a seed must not change.
TEST(Sample, ChoosesAsEver) {
  const Philox random(3, 0);
  std::vector<float> logits(1000);
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(random.block(i)[0] % 64) / 8.0f;
  }
  const std::vector<std::pair<double, std::vector<int64_t>>> cases = {
      {1.0, {941, 599, 640, 521, 856, 536, 228, 596}},
      {0.9, {941, 599, 640, 521, 874, 536, 228, 596}},
      {0.5, {981, 599, 640, 521, 600, 858, 228, 596}}};
  for (const auto& [top_p, tokens] : cases) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      const Sampling params{.temperature = 0.7, .top_p = top_p, .seed = 42};
      EXPECT_EQ(sample_token(logits, params, static_cast<int64_t>(1000 * i)), tokens[i]) << top_p;
    }
  }
}

/// What sample_token() chooses, by the definition: of the tokens that top-k, min-p and top-p leave,
/// the largest log p + Gumbel noise. `near`: top-p's border is so near that rounding decides it.
int64_t choose_by_definition(std::span<const float> logits,
                             const Sampling& params,
                             int64_t position,
                             int64_t choice,
                             bool* near) {
  std::vector<size_t> order;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > -INFINITY) order.push_back(i);
  }
  std::ranges::stable_sort(order, std::greater{}, [&](size_t i) { return logits[i]; });
  if (params.top_k > 0) order.resize(std::min(order.size(), static_cast<size_t>(params.top_k)));
  const double highest = logits[order[0]];
  const auto scaled = [&](size_t i) { return (logits[i] - highest) / params.temperature; };
  double total = 0;
  for (const size_t i : order) total += std::exp(scaled(i));
  const Philox random(params.seed, fnv1a64("sample") ^ static_cast<uint64_t>(position));
  size_t best = order[0];
  double best_key = -INFINITY, before = 0;
  *near = false;
  for (const size_t i : order) {
    const double share = before / total;
    if (i != order[0] && params.top_p < 1 && std::abs(share - params.top_p) < 1e-5) *near = true;
    if (i != order[0] && (std::exp(scaled(i)) < params.min_p || share >= params.top_p)) break;
    before += std::exp(scaled(i));
    const double uniform = random.uniform((static_cast<uint64_t>(choice) << 32) | i);
    const double exponential = std::max(-std::log1p(-uniform), 1e-300);
    const double key = scaled(i) - std::log(exponential);
    if (!(key > best_key) && (key != best_key || i > best)) continue;
    best = i;
    best_key = key;
  }
  return static_cast<int64_t>(best);
}

TEST(Sample, EveryInstructionSetChoosesByTheDefinition) {
  const Isa before = current_isa();
  std::mt19937 random(8);
  int compared = 0;
  for (int round = 0; round < 1200; ++round) {
    std::vector<float> logits(1 + random() % 1500);
    const float spread = std::array{0.1f, 3.0f, 20.0f, 4000.0f}[static_cast<size_t>(round % 4)];
    for (float& x : logits) {
      x = spread * (static_cast<float>(random()) / 4294967296.0f - 0.5f);
      if (random() % 50 == 0) x = random() % 2 == 0 ? -INFINITY : NAN;
    }
    logits[random() % logits.size()] = spread;
    Sampling params{.temperature = std::array{1.0, 0.3, 2.5}[random() % 3], .seed = random()};
    const auto choice = static_cast<int64_t>(random() % 4);
    if (round / 4 % 2 == 1) params.top_p = std::array{0.5, 0.9, 0.999}[random() % 3];
    if (round / 8 % 3 == 1) params.top_k = 1 + static_cast<int64_t>(random() % 60);
    if (round / 8 % 3 == 2) params.min_p = 0.05;
    const auto position = static_cast<int64_t>(random());
    bool near = false;
    const int64_t expected = choose_by_definition(logits, params, position, choice, &near);
    force_isa(Isa::kPortable);
    const int64_t portable = sample_token(logits, params, position, choice);
    if (!near) {
      EXPECT_EQ(portable, expected) << round;
      ++compared;
    }
    for (int isa = 1; isa <= static_cast<int>(detect_isa()); ++isa) {
      force_isa(static_cast<Isa>(isa));
      EXPECT_EQ(sample_token(logits, params, position, choice), portable)
          << round << " " << isa_name(current_isa());
    }
    force_isa(before);
  }
  EXPECT_GT(compared, 1100);
}

/// Draws at positions 0 to 39,999 against weights (not normalised; 0: never): the chi-square of
/// tokens that may come, and none of the others.
void expect_distribution(const std::vector<float>& logits,
                         const Sampling& params,
                         const std::vector<double>& weights,
                         double bound,
                         int64_t choice = 0) {
  constexpr int kDraws = 40000;
  std::vector<int> counts(logits.size(), 0);
  for (int i = 0; i < kDraws; ++i) {
    ++counts[static_cast<size_t>(sample_token(logits, params, i, choice))];
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double chi_square = 0.0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const double expected = kDraws * weights[i] / total;
    if (weights[i] == 0.0) {
      EXPECT_EQ(counts[i], 0) << i;
    } else {
      chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
    }
  }
  EXPECT_LT(chi_square, bound);
}

std::vector<float> logs(const std::vector<double>& weights) {
  std::vector<float> logits;
  for (const double weight : weights) logits.push_back(static_cast<float>(std::log(weight)));
  return logits;
}

// Bounds are the 0.1 % points of 1, 2 and 3 degrees of freedom.
TEST(Sample, TopKTopPMinPRestrictTheDistribution) {
  const std::vector<double> p = {0.05, 0.4, 0.25, 0.2, 0.1};
  const std::vector<float> logits = logs(p);
  expect_distribution(logits, {.seed = 2, .top_k = 3}, {0, 0.4, 0.25, 0.2, 0}, 13.82);
  expect_distribution(logits, {.seed = 3, .min_p = 0.24}, {0, 0.4, 0.25, 0.2, 0.1}, 16.27);
  expect_distribution(logits, {.seed = 4, .min_p = 0.6}, {0, 0.4, 0.25, 0, 0}, 10.83);
  // Of the three, the first two hold 0.65 / 0.85 of the mass; of all, 0.65.
  expect_distribution(logits, {.top_p = 0.7, .seed = 5, .top_k = 3}, {0, 0.4, 0.25, 0, 0}, 10.83);
  expect_distribution(logits, {.top_p = 0.7, .seed = 5}, {0, 0.4, 0.25, 0.2, 0}, 13.82);
  expect_distribution(logits, {.top_p = 0.7, .seed = 6, .min_p = 0.6}, {0, 0.4, 0.25, 0, 0}, 10.83);
  // The temperature comes first: at 0.5 the shares are squared.
  expect_distribution(logits, {.temperature = 0.5, .seed = 7, .min_p = 0.24},
                      {0, 0.16, 0.0625, 0.04, 0}, 13.82);
}

TEST(Sample, RestrictionsKeepTheLowestOfEqual) {
  const std::vector<float> logits = {1.0f, 2.0f, 2.0f, NAN, 2.0f};
  for (int64_t i = 0; i < 50; ++i) {
    EXPECT_EQ(sample_token(logits, {.seed = 8, .top_k = 1}, i), 1);
    EXPECT_EQ(sample_token(logits, {.top_p = 1e-9, .seed = 8}, i), 1);
    EXPECT_NE(sample_token(logits, {.seed = 8, .top_k = 2}, i), 4);
    EXPECT_NE(sample_token(logits, {.seed = 8, .min_p = 1.0}, i), 0);
    EXPECT_NE(sample_token(logits, {.seed = 8, .top_k = 100}, i), 3);
  }
}

TEST(Sample, ChoicesDifferAndEachFollowsTheDistribution) {
  const std::vector<double> p = {0.5, 0.3, 0.2};
  const std::vector<float> logits = logs(p);
  expect_distribution(logits, {.seed = 9}, p, 13.82, 1);
  int equal = 0;
  for (int64_t i = 0; i < 10000; ++i) {
    equal += sample_token(logits, {.seed = 9}, i, 1) == sample_token(logits, {.seed = 9}, i, 2);
  }
  // 0.38 of them, five standard deviations allowed.
  EXPECT_NEAR(equal, 3800, 243);
}

TEST(Sample, MaskedTokensAreNeverChosen) {
  std::vector<float> row(70);
  for (size_t i = 0; i < row.size(); ++i) row[i] = static_cast<float>(i);
  std::vector<float> logits = row;
  const Sampling plain;
  const auto masked = [&](const std::vector<uint32_t>& mask) {
    logits = row;
    adjust_logits(logits, {.sampling = plain, .mask = mask});
  };
  masked({0, 1u << 5});  // the third word is missing
  for (int64_t i = 0; i < 20; ++i) {
    EXPECT_EQ(sample_token(logits, {.temperature = 100.0, .seed = 1}, i), 37);
    EXPECT_EQ(sample_token(logits, {.top_p = 0.5, .seed = 1, .top_k = 5, .min_p = 0.1}, i), 37);
  }
  EXPECT_EQ(sample_token(logits, {.temperature = 0.0}, 0), 37);
  masked({~0u, ~0u, ~0u});
  EXPECT_EQ(logits, row);
  masked({0, 0, 0});
  EXPECT_THROW(sample_token(logits, {}, 0), Error);
  EXPECT_THROW(sample_token(logits, {.temperature = 0.0}, 0), Error);
}

TEST(Sample, AvoidedTokensAreChosenWhereNothingElseCanBe) {
  const Sampling greedy{.temperature = 0.0};
  const std::vector<float> row = {1.0f, 3.0f, 2.0f};
  const std::vector<int64_t> avoided = {1}, two = {1, 2};
  const std::vector<uint32_t> only = {2};
  const auto drawn = [&](std::span<const int64_t> tokens, std::span<const uint32_t> mask) {
    const DrawRow one{.logits = row,
                      .adjustment = {.sampling = greedy, .mask = mask, .avoided = tokens}};
    Drawn token;
    draw_rows({&one, 1}, {&token, 1});
    return token.token;
  };
  EXPECT_EQ(drawn(avoided, {}), 2);
  EXPECT_EQ(drawn(two, {}), 0);
  EXPECT_EQ(drawn(two, only), 1);
}

TEST(Sample, TopLogProbabilitiesAreSorted) {
  const std::vector<float> logits = {0.5f, NAN, 2.0f, 0.5f, -INFINITY};
  const LogSoftmax model(logits);
  const std::vector<TokenLogprob> top = model.top(3);
  ASSERT_EQ(top.size(), 3u);
  EXPECT_EQ(top[0].token, 2);
  EXPECT_EQ(top[1].token, 0);
  EXPECT_EQ(top[2].token, 3);
  for (const TokenLogprob& x : top) EXPECT_EQ(x.logprob, model.of(x.token));
  EXPECT_NEAR(std::exp(top[0].logprob) + 2 * std::exp(top[1].logprob), 1.0, 1e-12);
  EXPECT_EQ(model.top(20).size(), 4u);
  EXPECT_TRUE(model.top(0).empty());
}

TEST(Sample, LogProbabilitySumsToOne) {
  const std::vector<float> logits = {0.3f, -2.0f, 5.0f};
  double total = 0.0;
  for (int64_t i = 0; i < 3; ++i) total += std::exp(LogSoftmax(logits).of(i));
  EXPECT_NEAR(total, 1.0, 1e-12);
}

/// Rows with ties, NaN and -infinity, and ways to draw from them.
struct RandomDraw {
  std::vector<float> logits;
  Sampling sampling;
  int64_t position, choice;

  RandomDraw(std::mt19937& random, int round) : logits(1 + random() % 3000) {
    const float spread = std::array{0.1f, 3.0f, 20.0f, 400.0f}[static_cast<size_t>(round % 4)];
    for (float& x : logits) {
      x = spread * (static_cast<float>(random()) / 4294967296.0f - 0.5f);
      if (round % 3 == 0) x = std::round(4.0f * x) / 4.0f;
      if (random() % 50 == 0) x = random() % 2 == 0 ? -INFINITY : NAN;
    }
    logits[random() % logits.size()] = spread;
    sampling.temperature = std::array{1.0, 0.3, 2.5, 0.0}[random() % 4];
    sampling.seed = random();
    if (round / 4 % 2 == 1) sampling.top_p = std::array{0.5, 0.9, 0.999}[random() % 3];
    if (round / 8 % 3 == 1) sampling.top_k = 1 + static_cast<int64_t>(random() % 60);
    if (round / 8 % 3 == 2) sampling.min_p = 0.05;
    position = static_cast<int64_t>(random());
    choice = static_cast<int64_t>(random() % 4);
  }
  DrawRow row() const {
    return {.logits = logits,
            .adjustment = {.sampling = sampling},
            .position = position,
            .choice = choice,
            .top_logprobs = 3,
            .sampled_logprob = true};
  }
};

TEST(Sample, RowsTogetherAreRowsAlone) {
  std::mt19937 random(12);
  std::vector<RandomDraw> draws;
  for (int round = 0; round < 200; ++round) draws.emplace_back(random, round);
  draws[17].logits.assign(9, NAN);
  std::vector<DrawRow> rows;
  for (const RandomDraw& draw : draws) rows.push_back(draw.row());
  std::vector<Drawn> together(rows.size());
  draw_rows(rows, together);
  const Isa before = current_isa();
  for (int isa = 0; isa <= static_cast<int>(detect_isa()); ++isa) {
    force_isa(static_cast<Isa>(isa));
    for (size_t i = 0; i < rows.size(); ++i) {
      Drawn alone;
      draw_rows({&rows[i], 1}, {&alone, 1});
      EXPECT_EQ(alone.token, together[i].token);
      EXPECT_EQ(alone.logprob, together[i].logprob);
      EXPECT_EQ(alone.top, together[i].top);
      EXPECT_EQ(alone.sampled_logprob, together[i].sampled_logprob);
      EXPECT_EQ(alone.token == -1, i == 17);
      if (i != 17) {
        EXPECT_EQ(alone.token, sample_token(draws[i].logits, draws[i].sampling, draws[i].position,
                                            draws[i].choice));
      }
    }
  }
  force_isa(before);
}

// By the definition, in double precision: who is kept, and the softmax over them. `border`: how
// near top-p's border comes to one of them, in shares of the mass.
std::vector<double> kept_probabilities(const RandomDraw& draw, double* border) {
  const Sampling& s = draw.sampling;
  std::vector<size_t> order;
  for (size_t i = 0; i < draw.logits.size(); ++i)
    if (draw.logits[i] > -INFINITY) order.push_back(i);
  std::ranges::stable_sort(order,
                           [&](size_t a, size_t b) { return draw.logits[a] > draw.logits[b]; });
  if (s.top_k > 0 && s.top_k < std::ssize(order)) order.resize(static_cast<size_t>(s.top_k));
  const double highest = draw.logits[order[0]];
  const auto weight = [&](size_t i) {
    return std::exp((static_cast<double>(draw.logits[i]) - highest) / s.temperature);
  };
  double all = 0, kept = 0, before = 0;
  for (const size_t i : order) all += weight(i);
  std::vector<double> probabilities(draw.logits.size());
  *border = 1;
  for (const size_t i : order) {
    const double share = before / all;
    before += weight(i);
    if (i != order[0]) *border = std::min(*border, std::abs(share - s.top_p));
    if (i != order[0] && (weight(i) < s.min_p || (s.top_p < 1 && share >= s.top_p))) continue;
    probabilities[i] = weight(i);
    kept += weight(i);
  }
  for (double& p : probabilities) p /= kept;
  return probabilities;
}

TEST(Sample, SampledLogprobsAreThoseOfTheDistributionDrawnFrom) {
  std::mt19937 random(13);
  int compared = 0;
  for (int round = 0; round < 600; ++round) {
    RandomDraw draw(random, round);
    if (draw.sampling.temperature == 0.0) {
      Drawn greedy;
      const DrawRow row = draw.row();
      draw_rows({&row, 1}, {&greedy, 1});
      EXPECT_EQ(greedy.sampled_logprob, 0.0);
      continue;
    }
    double border = 1;
    const std::vector<double> wanted = kept_probabilities(draw, &border);
    if (border < 1e-6) continue;  // rounding decides who is kept
    // Whatever is drawn; over all that can be, the probabilities are one.
    std::vector<double> found(draw.logits.size());
    for (int64_t i = 0; i < 12; ++i) {
      draw.position += 1;
      const DrawRow row = draw.row();
      Drawn drawn;
      draw_rows({&row, 1}, {&drawn, 1});
      const auto token = static_cast<size_t>(drawn.token);
      ASSERT_GT(wanted[token], 0) << round;
      ASSERT_NEAR(drawn.sampled_logprob, std::log(wanted[token]), 1e-6) << round;
      found[token] = std::exp(drawn.sampled_logprob);
    }
    const auto kept = std::ranges::count_if(wanted, [](double p) { return p > 0; });
    if (kept <= 3) {
      for (int64_t i = 0; i < 2000; ++i) {
        draw.position += 1;
        const DrawRow row = draw.row();
        Drawn drawn;
        draw_rows({&row, 1}, {&drawn, 1});
        found[static_cast<size_t>(drawn.token)] = std::exp(drawn.sampled_logprob);
      }
      double total = 0, missing = 0;
      for (size_t i = 0; i < found.size(); ++i) {
        total += found[i];
        if (found[i] == 0) missing += wanted[i];
      }
      EXPECT_NEAR(total + missing, 1.0, 1e-9);
    }
    ++compared;
  }
  EXPECT_GT(compared, 350);
}

}  // namespace
}  // namespace hadal::ops
