// A step has the same bits on any number of ranks, and what is wrong on one is seen by all
// (docs/decisions/0023-ranks.md).
#include "dist/ranks.h"

#include <cmath>
#include <limits>
#include <mutex>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/init.h"
#include "testing/kernel_checks.h"
#include "testing/packed_rows.h"
#include "testing/rank_threads.h"
#include "testing/tiny_model.h"
#include "train/ownership.h"
#include "train/schedule.h"
#include "train/step.h"

namespace hadal::train {
namespace {

using model::AttentionMode;
using ops::Numerics;

TEST(RowShare, NodesOfAllRanksJoinToTheTree) {
  // A node as the text of its sums: where they differ, so would the bits.
  struct Node {
    Span span;
    std::string sum;
  };
  const auto join = [](Node& left, const Node& right) {
    left.sum = concat('(', left.sum, '+', right.sum, ')');
  };
  const auto leaf = [](int64_t i) { return Node{{i, i + 1}, concat(i)}; };
  for (int64_t rows = 1; rows <= 40; ++rows) {
    std::vector<Node> whole;
    for (int64_t row = 0; row < rows; ++row) {
      whole.push_back(leaf(row));
      join_meeting(whole, rows, join);
    }
    ASSERT_EQ(whole.size(), 1U);
    for (int64_t ranks = 1; ranks <= 17; ++ranks) {
      std::vector<Node> all;
      int64_t next = 0;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        const Span share = row_share(rows, ranks, rank);
        EXPECT_EQ(share.begin, next);
        EXPECT_LE(share.size(), (rows + ranks - 1) / ranks);
        next = share.end;
        std::vector<Node> own;
        for (int64_t row = share.begin; row < share.end; ++row) {
          own.push_back(leaf(row));
          // While rows come, nobody knows where they end.
          join_meeting(own, INT64_MAX, join);
        }
        join_meeting(own, rows, join);
        const std::vector<Span> nodes = nodes_of(share, rows);
        ASSERT_EQ(nodes.size(), own.size());
        for (size_t i = 0; i < own.size(); ++i) {
          EXPECT_EQ(own[i].span, nodes[i]);
          all.push_back(own[i]);
          join_meeting(all, rows, join);
        }
      }
      EXPECT_EQ(next, rows);
      ASSERT_EQ(all.size(), 1U) << rows << " rows on " << ranks << " ranks";
      EXPECT_EQ(all[0].sum, whole[0].sum);
    }
  }
}

TEST(Ownership, FillsBucketsEvenlyAndCutsNothing) {
  // Many matrices of a few sizes, as models have them.
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < 200; ++i) sizes.push_back(i % 5 == 0 ? 900 : 100 + i % 3);
  const int64_t total = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
  for (const int64_t ranks : {1, 2, 3, 8, 16}) {
    std::vector<int64_t> loads, found(static_cast<size_t>(ranks), 0);
    const std::vector<int64_t> buckets = fill_buckets(sizes, ranks, loads);
    for (size_t i = 0; i < sizes.size(); ++i) found[static_cast<size_t>(buckets[i])] += sizes[i];
    EXPECT_EQ(found, loads);
    const int64_t most = *std::max_element(loads.begin(), loads.end());
    EXPECT_LE(static_cast<double>(most), 1.05 * static_cast<double>(total / ranks));
  }
}

using Named = std::vector<std::pair<std::string, at::Tensor>>;

struct Case {
  AttentionMode mode = AttentionMode::kSparse;
  Numerics numerics = Numerics::kIdeal;
  int64_t rows = 5;
  int steps = 2;
};

/// Ranks are threads here, and all of them draw from LibTorch's one generator.
model::Transformer make_model(const Case& c) {
  static std::mutex generator;
  const std::lock_guard<std::mutex> lock(generator);
  const bool released = c.numerics == Numerics::kReleased;
  return testing::random_model(released ? testing::mini_config() : testing::tiny_config(), 4,
                               at::kFloat);
}

struct World {
  model::Transformer model;
  Optimizer optimizer;

  World(const Case& c, const dist::Ranks& ranks)
      : model(make_model(c)),
        optimizer(trained(), {}, Ownership(model, ranks.size(), ranks.rank())) {}

  model::Transformer& trained() {
    model::require_gradients(model);
    return model;
  }
  StepOutcome step(const Case& c, int64_t micro_rows, dist::Ranks& ranks) {
    const StepShare share{.rows = row_share(c.rows, ranks.size(), ranks.rank()), .total = c.rows};
    std::vector<MicroBatch> batches;
    for (int64_t row = share.rows.begin; row < share.rows.end; row += micro_rows) {
      const int64_t count = std::min(micro_rows, share.rows.end - row);
      batches.emplace_back(testing::packed_rows(row, count, 48), at::Device(at::kCPU));
    }
    const StepRules rules{.objective = {.balance_weight = 0.1,
                                        .mode = c.mode,
                                        .numerics = c.numerics,
                                        .count_clamps = true},
                          .learning_rate = 1e-3,
                          .clip_norm = 0.01,  // it clips: the norm moves everything
                          .router_bias_speed = 1e-3};
    return training_step(model, optimizer, batches, rules, share, ranks);
  }
};

/// Everything that some steps leave on a rank; optimizer state where it is.
Named steps(const Case& c, int64_t micro_rows, dist::Ranks& ranks) {
  World world(c, ranks);
  Named result;
  for (int step = 0; step < c.steps; ++step) {
    const StepOutcome outcome = world.step(c, micro_rows, ranks);
    const StepMeasures& m = outcome.measures;
    result.emplace_back("main", m.main_loss);
    result.emplace_back("mtp", m.mtp_loss);
    result.emplace_back("balance", m.balance_loss);
    result.emplace_back("index", m.index_loss);
    result.emplace_back("clamped", m.clamped);
    for (const at::Tensor& load : m.expert_load) result.emplace_back("load", load);
    result.emplace_back("norm", at::full({}, outcome.norm, at::kDouble));
    EXPECT_TRUE(outcome.moved);
  }
  world.model.visit([&](model::Parameter& p) { result.emplace_back(p.name, p.value.detach()); });
  for (auto& entry : world.optimizer.state()) result.push_back(std::move(entry));
  return result;
}

void expect_same(const Named& a, const Named& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].second.defined(), b[i].second.defined()) << what << ": " << a[i].first;
    if (!a[i].second.defined() || b[i].second.is_meta()) continue;
    EXPECT_TRUE(testing::same_bits(a[i].second, b[i].second)) << what << ": " << a[i].first;
  }
}

class AnyRanks : public ::testing::TestWithParam<std::tuple<AttentionMode, Numerics>> {};

TEST_P(AnyRanks, GiveTheBitsOfOne) {
  const testing::OneAtenThread one_thread;
  const auto [mode, numerics] = GetParam();
  {
    const Case c{.mode = mode, .numerics = numerics};
    dist::Ranks one;
    const Named expected = steps(c, c.rows, one);
    // Five rows on eight ranks: three have none.
    for (const auto& [count, micro_rows] :
         std::vector<std::pair<int64_t, int64_t>>{{2, 1}, {3, 2}, {8, 1}}) {
      std::vector<int64_t> states(static_cast<size_t>(count), 0);
      const auto errors = testing::run_ranks(count, [&](dist::Ranks& ranks) {
        const Named found = steps(c, micro_rows, ranks);
        expect_same(expected, found, concat("rank ", ranks.rank(), " of ", count));
        for (const auto& [name, tensor] : found) {
          if (name.find('/') != std::string::npos && !tensor.is_meta())
            states[static_cast<size_t>(ranks.rank())] += static_cast<int64_t>(tensor.nbytes());
        }
      });
      for (const std::string& error : errors) EXPECT_EQ(error, "");
      // Every state once, and nearly as much on each.
      int64_t all = 0;
      for (const auto& [name, tensor] : expected)
        if (name.find('/') != std::string::npos) all += static_cast<int64_t>(tensor.nbytes());
      EXPECT_EQ(std::accumulate(states.begin(), states.end(), int64_t{0}), all);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes,
                         AnyRanks,
                         ::testing::Values(std::tuple(AttentionMode::kDense, Numerics::kIdeal),
                                           std::tuple(AttentionMode::kIndexerWarmup,
                                                      Numerics::kIdeal),
                                           std::tuple(AttentionMode::kSparse, Numerics::kBf16),
                                           std::tuple(AttentionMode::kSparse, Numerics::kReleased)),
                         [](const auto& c) {
                           return std::string(attention_mode_name(std::get<0>(c.param))) + "_" +
                                  ops::numerics_name(std::get<1>(c.param));
                         });

// A rank whose memory is damaged: everybody leaves the step out and names it.
TEST(RanksNotFinite, AreSeenByAllAndNamed) {
  const testing::OneAtenThread one_thread;
  const Case c{.mode = AttentionMode::kDense, .rows = 4};
  const std::string where = "layers.1.attn_norm.weight";
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    for (int64_t broken = 0; broken < 3; ++broken) {
      const auto errors = testing::run_ranks(3, [&](dist::Ranks& ranks) {
        World world(c, ranks);
        Named before;
        world.model.visit([&](model::Parameter& p) {
          if (p.name == where && ranks.rank() == broken) {
            const at::NoGradGuard no_grad;
            p.value[3] = bad;
          }
          before.emplace_back(p.name, p.value.detach().clone());
        });
        const StepOutcome outcome = world.step(c, 1, ranks);
        // Rank 2 has no row of four: nothing of its damage reaches the step.
        const bool seen = row_share(c.rows, 3, broken).size() > 0;
        EXPECT_EQ(outcome.moved, !seen);
        EXPECT_EQ(outcome.not_finite.size(), seen ? 1U : 0U);
        for (const std::string& name : outcome.not_finite)
          EXPECT_EQ(name.rfind(concat("rank ", broken, ": "), 0), 0U) << name;
        if (!seen) return;
        Named after;
        world.model.visit(
            [&](model::Parameter& p) { after.emplace_back(p.name, p.value.detach()); });
        expect_same(before, after, "nothing moves");
      });
      for (const std::string& error : errors) EXPECT_EQ(error, "");
    }
  }
}

// What a norm a rank would give: another number, so that the comparison above can fail.
TEST(RanksNorm, IsNoMeanOfTheirNorms) {
  const testing::OneAtenThread one_thread;
  const Case c{.mode = AttentionMode::kDense, .rows = 4};
  dist::Ranks one;
  World whole(c, one);
  const double expected = whole.step(c, 4, one).norm;
  std::vector<double> own(2, 0.0);
  const auto errors = testing::run_ranks(2, [&](dist::Ranks& ranks) {
    World world(c, ranks);
    EXPECT_EQ(world.step(c, 1, ranks).norm, expected);
    double squares = 0.0;
    for (const OptimizerSlot& slot : world.optimizer.slots()) {
      const at::Tensor& grad = slot.parameter->value.grad();
      if (grad.defined()) squares += grad.to(at::kDouble).square().sum().item<double>();
    }
    own[static_cast<size_t>(ranks.rank())] = std::sqrt(squares);
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  EXPECT_GT(own[0], 0.0);
  EXPECT_GT(own[1], 0.0);
  EXPECT_GT(std::abs((own[0] + own[1]) / 2.0 - expected), 1e-3 * expected);
}

// No sample is long enough for a block: what works on blocks has no gradient, and its moments
// decay.
TEST(NoGradient, IsAGradientOfZero) {
  const testing::OneAtenThread one_thread;
  const Case c{.mode = AttentionMode::kDense, .rows = 2};
  dist::Ranks one;
  World world(c, one);
  world.step(c, 2, one);
  const OptimizerSlot* slot = nullptr;
  for (const OptimizerSlot& each : world.optimizer.slots())
    if (each.parameter->name.find(".attn.compressor.norm.weight") != std::string::npos)
      slot = &each;
  ASSERT_NE(slot, nullptr);
  const at::Tensor before = slot->momentum.clone();
  ASSERT_GT(before.abs().max().item<float>(), 0.0f);
  PackedRows rows = testing::packed_rows(0, 1, 48);
  rows.sample_lengths.assign(48 / 3, 3);
  const std::vector<MicroBatch> batches = {MicroBatch(rows, at::Device(at::kCPU))};
  const StepRules rules{.objective = {.mode = c.mode, .numerics = c.numerics},
                        .learning_rate = 1e-3};
  training_step(world.model, world.optimizer, batches, rules);
  EXPECT_TRUE(testing::same_bits(slot->momentum, before * 0.9));
}

}  // namespace
}  // namespace hadal::train
