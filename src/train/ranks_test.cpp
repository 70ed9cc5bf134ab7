// A step has the same bits on any number of ranks, and what is wrong on one is seen by all
// (docs/decisions/0023-ranks.md).
#include "dist/ranks.h"

#include <algorithm>
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
#include "train/optimizer.h"
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

using Named = std::vector<std::pair<std::string, at::Tensor>>;

struct Case {
  AttentionMode mode = AttentionMode::kSparse;
  Numerics numerics = Numerics::kIdeal;
  int64_t rows = 5;
  int steps = 2;
  double learning_rate = 1e-3;
  OptimizerParams optimizer = {};
};

/// Ranks are threads here, and all of them draw from LibTorch's one generator.
model::Transformer make_model(const Case& c) {
  static std::mutex generator;
  const std::lock_guard<std::mutex> lock(generator);
  const bool released = c.numerics == Numerics::kReleased || c.numerics == Numerics::kFp8;
  return testing::random_model(released ? testing::mini_config() : testing::tiny_config(), 4,
                               at::kFloat);
}

struct World {
  model::Transformer model;
  Optimizer optimizer;

  World(const Case& c, dist::Ranks& ranks)
      : model(make_model(c)),
        optimizer(trained(), c.optimizer, Ownership(model, ranks.size(), ranks.rank())) {
    optimizer.hold_for(c.numerics, ranks);
  }

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
                          .learning_rate = c.learning_rate,
                          .clip_norm = 0.01,  // it clips: the norm moves everything
                          .router_bias_speed = 1e-3};
    return training_step(model, optimizer, batches, rules, share, ranks);
  }
};

/// Everything that some steps leave on a rank.
struct Left {
  Named everywhere;                ///< measures, and what forward passes read
  std::vector<StateTensor> state;  ///< masters and moments, the rank's parts
};

void add_world(World& world, Numerics numerics, Left& left) {
  const at::NoGradGuard no_grad;
  world.model.visit([&](const model::Parameter& p) {
    left.everywhere.emplace_back(p.name, p.kind == model::ParamKind::kHashTable
                                             ? p.value
                                             : p.operand(numerics).detach().clone());
  });
  for (size_t slot = 0; slot < world.optimizer.slots().size(); ++slot)
    left.state.push_back(world.optimizer.masters(slot));
  for (StateTensor& moments : world.optimizer.state()) left.state.push_back(std::move(moments));
}

void add_step(World& world, const Case& c, int64_t micro_rows, dist::Ranks& ranks, Left& left) {
  const StepOutcome outcome = world.step(c, micro_rows, ranks);
  const StepMeasures& m = outcome.measures;
  left.everywhere.emplace_back("main", m.main_loss);
  left.everywhere.emplace_back("mtp", m.mtp_loss);
  left.everywhere.emplace_back("balance", m.balance_loss);
  left.everywhere.emplace_back("index", m.index_loss);
  left.everywhere.emplace_back("clamped", m.clamped);
  for (const at::Tensor& load : m.expert_load) left.everywhere.emplace_back("load", load);
  left.everywhere.emplace_back("norm", at::full({}, outcome.norm, at::kDouble));
  EXPECT_TRUE(outcome.moved);
}

Left steps(const Case& c, int64_t micro_rows, dist::Ranks& ranks) {
  World world(c, ranks);
  Left left;
  for (int step = 0; step < c.steps; ++step) add_step(world, c, micro_rows, ranks, left);
  add_world(world, c.numerics, left);
  return left;
}

void expect_same(const Named& a, const Named& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].second.defined(), b[i].second.defined()) << what << ": " << a[i].first;
    if (!a[i].second.defined()) continue;
    EXPECT_TRUE(testing::same_bits(a[i].second, b[i].second)) << what << ": " << a[i].first;
  }
}

/// Of all tensors this rank's parts; `seen` counts the elements that some rank has.
void expect_same(const Left& whole, const Left& found, const std::string& what, int64_t& seen) {
  expect_same(whole.everywhere, found.everywhere, what);
  ASSERT_EQ(whole.state.size(), found.state.size());
  for (size_t i = 0; i < whole.state.size(); ++i) {
    ASSERT_EQ(whole.state[i].parts.size(), 1U);
    const at::Tensor& all = whole.state[i].parts[0].values;
    for (const StateTensor::Part& part : found.state[i].parts) {
      seen += part.values.numel();
      EXPECT_TRUE(testing::same_bits(all.narrow(0, part.begin, part.values.numel()), part.values))
          << what << ": " << whole.state[i].name << " from " << part.begin;
    }
  }
}

int64_t elements_of(const std::vector<StateTensor>& state) {
  int64_t elements = 0;
  for (const StateTensor& tensor : state) elements += tensor.whole.numel();
  return elements;
}

class AnyRanks : public ::testing::TestWithParam<std::tuple<AttentionMode, Numerics>> {};

TEST_P(AnyRanks, GiveTheBitsOfOne) {
  const testing::OneAtenThread one_thread;
  const auto [mode, numerics] = GetParam();
  {
    const Case c{.mode = mode, .numerics = numerics};
    dist::Ranks one;
    const Left expected = steps(c, c.rows, one);
    // Five rows on eight ranks: three have none.
    for (const auto& [count, micro_rows] :
         std::vector<std::pair<int64_t, int64_t>>{{2, 1}, {3, 2}, {8, 1}}) {
      std::vector<int64_t> seen(static_cast<size_t>(count), 0);
      const auto errors = testing::run_ranks(count, [&](dist::Ranks& ranks) {
        const Left found = steps(c, micro_rows, ranks);
        expect_same(expected, found, concat("rank ", ranks.rank(), " of ", count),
                    seen[static_cast<size_t>(ranks.rank())]);
      });
      for (const std::string& error : errors) EXPECT_EQ(error, "");
      // Every element on one rank.
      EXPECT_EQ(std::accumulate(seen.begin(), seen.end(), int64_t{0}), elements_of(expected.state));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Modes,
                         AnyRanks,
                         ::testing::Values(std::tuple(AttentionMode::kDense, Numerics::kIdeal),
                                           std::tuple(AttentionMode::kIndexerWarmup,
                                                      Numerics::kIdeal),
                                           std::tuple(AttentionMode::kSparse, Numerics::kBf16),
                                           std::tuple(AttentionMode::kSparse, Numerics::kReleased),
                                           std::tuple(AttentionMode::kSparse, Numerics::kFp8)),
                         [](const auto& c) {
                           return std::string(attention_mode_name(std::get<0>(c.param))) + "_" +
                                  ops::numerics_name(std::get<1>(c.param));
                         });

// Stages of other numerics: masters go apart from values, and come together again.
TEST(RanksNumerics, MayChangeBetweenSteps) {
  const testing::OneAtenThread one_thread;
  const std::vector<Numerics> order = {Numerics::kBf16, Numerics::kReleased, Numerics::kFp8,
                                       Numerics::kIdeal, Numerics::kReleased};
  const auto run = [&](dist::Ranks& ranks) {
    // The released formats ask for the larger of the two models from the start.
    World world({.numerics = Numerics::kReleased}, ranks);
    Left left;
    for (const Numerics numerics : order) {
      const Case c{.mode = AttentionMode::kDense, .numerics = numerics, .rows = 3};
      world.optimizer.hold_for(numerics, ranks);
      add_step(world, c, 1, ranks, left);
      Left seen;
      add_world(world, numerics, seen);
      left.everywhere.insert(left.everywhere.end(), seen.everywhere.begin(), seen.everywhere.end());
      if (&numerics == &order.back()) left.state = seen.state;
    }
    return left;
  };
  dist::Ranks one;
  const Left expected = run(one);
  std::vector<int64_t> seen(3, 0);
  const auto errors = testing::run_ranks(3, [&](dist::Ranks& ranks) {
    expect_same(expected, run(ranks), concat("rank ", ranks.rank()),
                seen[static_cast<size_t>(ranks.rank())]);
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  EXPECT_EQ(seen[0] + seen[1] + seen[2], elements_of(expected.state));
}

// What a rank holds between steps falls with their number: FP32 is on owners alone.
TEST(RanksMemory, MastersAreOnOwnersAlone) {
  const testing::OneAtenThread one_thread;
  const Case c{.numerics = Numerics::kReleased};
  for (const int64_t count : {2, 4}) {
    const auto errors = testing::run_ranks(count, [&](dist::Ranks& ranks) {
      World world(c, ranks);
      int64_t rounded = 0, masters = 0;
      for (const OptimizerSlot& slot : world.optimizer.slots()) {
        const model::Parameter& p = *slot.parameter;
        const bool computes_in_bf16 = (p.is_matrix() || p.kind == model::ParamKind::kEmbedding ||
                                       p.kind == model::ParamKind::kHead);
        EXPECT_EQ(p.value.scalar_type() == at::kBFloat16, computes_in_bf16) << p.name;
        if (computes_in_bf16) rounded += p.value.numel();
      }
      for (const OwnedPiece& own : world.optimizer.pieces()) {
        EXPECT_EQ(own.master.defined(), own.parameter->value.scalar_type() == at::kBFloat16);
        if (own.master.defined()) masters += own.master.numel();
      }
      // A bucket may be fuller than the mean, by a matrix at most.
      EXPECT_LT(masters, rounded * 4 / (3 * count));
      EXPECT_GT(masters, 0);
    });
    for (const std::string& error : errors) EXPECT_EQ(error, "");
  }
}

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
  const Case c{.mode = AttentionMode::kDense, .rows = 4, .learning_rate = 0.0};
  dist::Ranks one;
  World whole(c, one);
  const double expected = whole.step(c, 4, one).norm;
  std::vector<double> own(2, 0.0);
  const auto errors = testing::run_ranks(2, [&](dist::Ranks& ranks) {
    World world(c, ranks);
    EXPECT_EQ(world.step(c, 1, ranks).norm, expected);
    double squares = 0.0;
    for (const OwnedPiece& piece : world.optimizer.pieces())
      if (piece.gradient.defined())
        squares += piece.gradient.to(at::kDouble).square().sum().item<double>();
    own[static_cast<size_t>(ranks.rank())] = std::sqrt(squares);
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  EXPECT_GT(own[0], 0.0);
  EXPECT_GT(own[1], 0.0);
  EXPECT_GT(std::abs((own[0] + own[1]) / 2.0 - expected), 1e-3 * expected);
}

// Counts of targets, rows and queries are those of the step, whoever has the rows.
TEST(RanksCounts, AreThoseOfOneRank) {
  const model::ModelConfig config = testing::tiny_config();
  const auto counts_of = [&](const Span& rows) {
    StepCounts counts;
    for (int64_t row = rows.begin; row < rows.end; ++row)
      counts.add(MicroBatch(testing::packed_rows(row, 1, 48), at::Device(at::kCPU)), config);
    return counts;
  };
  const StepCounts expected = counts_of({0, 5});
  ASSERT_GT(expected.targets, 0);
  const auto errors = testing::run_ranks(3, [&](dist::Ranks& ranks) {
    StepCounts counts = counts_of(row_share(5, 3, ranks.rank()));
    sum_counts(counts, config, ranks);
    EXPECT_EQ(counts.targets, expected.targets);
    EXPECT_EQ(counts.mtp_targets, expected.mtp_targets);
    EXPECT_EQ(counts.rows, expected.rows);
    EXPECT_EQ(counts.index_queries, expected.index_queries);
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
}

/// What a rank sums, and the absolute values of what it sends.
struct Summed {
  std::vector<at::Tensor> own;   ///< of its pieces
  std::vector<size_t> pieces;    ///< their numbers
  std::vector<at::Tensor> sent;  ///< by parameter: sum of absolute values over its nodes
};

Summed summed(const Case& c, dist::Ranks& ranks) {
  World world(c, ranks);
  const StepShare share{.rows = row_share(c.rows, ranks.size(), ranks.rank()), .total = c.rows};
  const ObjectiveParams objective{.mode = c.mode, .numerics = c.numerics};
  std::vector<MicroBatch> batches;
  for (int64_t row = share.rows.begin; row < share.rows.end; ++row)
    batches.emplace_back(testing::packed_rows(row, 1, 48), at::Device(at::kCPU));
  StepCounts counts;
  for (const MicroBatch& batch : batches) counts.add(batch, world.model.config());
  sum_counts(counts, world.model.config(), ranks);
  Summed result;
  for (const bool exchange : {false, true}) {
    StepSums sums(world.model, share.rows.begin);
    for (const MicroBatch& batch : batches) accumulate(world.model, batch, counts, objective, sums);
    if (!exchange) {
      result.sent.resize(sums.parameters().size());
      for (const StepNode& node : sums.take(share.total))
        for (size_t p = 0; p < node.gradients.size(); ++p)
          if (node.gradients[p].defined())
            add_in_place(result.sent[p], node.gradients[p].abs().view({-1}));
      continue;
    }
    std::vector<NotFinite> not_finite;
    sum_over_ranks(sums, share, world.model.config(), world.optimizer, ranks, not_finite);
  }
  const std::vector<PlanPiece>& all = world.optimizer.ownership().pieces();
  for (const OwnedPiece& own : world.optimizer.pieces()) {
    result.own.push_back(own.gradient);
    result.pieces.push_back(
        static_cast<size_t>(std::find(all.begin(), all.end(), own.piece) - all.begin()));
  }
  return result;
}

// |sum of roundings - sum| <= 2^-7 sum |node|, and the additions in FP32 on both sides.
TEST(RanksBf16Gradients, OfExpertsAloneWithinTheirBound) {
  const testing::OneAtenThread one_thread;
  const Case exact{.mode = AttentionMode::kDense, .numerics = Numerics::kBf16, .rows = 6};
  Case halved = exact;
  halved.optimizer.bf16_expert_gradients = true;
  Case reseeded = halved;
  reseeded.optimizer.seed = 2;
  constexpr int64_t kRanks = 3;
  std::vector<Summed> in_fp32(kRanks), in_bf16(kRanks), again(kRanks), other(kRanks);
  std::vector<PlanPiece> pieces;
  std::vector<bool> is_expert;
  const auto errors = testing::run_ranks(kRanks, [&](dist::Ranks& ranks) {
    const auto rank = static_cast<size_t>(ranks.rank());
    in_fp32[rank] = summed(exact, ranks);
    in_bf16[rank] = summed(halved, ranks);
    again[rank] = summed(halved, ranks);
    other[rank] = summed(reseeded, ranks);
    if (!ranks.first()) return;
    World world(exact, ranks);
    pieces = world.optimizer.ownership().pieces();
    for (const OptimizerSlot& slot : world.optimizer.slots())
      is_expert.push_back(slot.parameter->kind == model::ParamKind::kExperts);
  });
  for (const std::string& error : errors) ASSERT_EQ(error, "");
  int64_t changed = 0, reseeded_differ = 0;
  for (size_t rank = 0; rank < kRanks; ++rank) {
    for (size_t i = 0; i < in_fp32[rank].own.size(); ++i) {
      const at::Tensor &expected = in_fp32[rank].own[i], &found = in_bf16[rank].own[i];
      ASSERT_EQ(expected.defined(), found.defined());
      if (!expected.defined()) continue;
      EXPECT_TRUE(testing::same_bits(found, again[rank].own[i]));
      const PlanPiece& piece = pieces[in_fp32[rank].pieces[i]];
      if (!is_expert[piece.item]) {
        EXPECT_TRUE(testing::same_bits(expected, found));
        continue;
      }
      at::Tensor bound = at::zeros_like(expected);
      for (const Summed& from : in_fp32)
        if (from.sent[piece.item].defined())
          bound += from.sent[piece.item].narrow(0, piece.begin, piece.size());
      const at::Tensor error = (found - expected).abs();
      EXPECT_TRUE((error <= bound * (0x1p-7f + 0x1p-20f)).all().item<bool>());
      changed += (error > 0).sum().item<int64_t>();
      reseeded_differ += (other[rank].own[i] != found).sum().item<int64_t>();
    }
  }
  EXPECT_GT(changed, 0);
  EXPECT_GT(reseeded_differ, 0);
}

// No sample is long enough for a block: what works on blocks has no gradient, and its moments
// decay.
TEST(NoGradient, IsAGradientOfZero) {
  const testing::OneAtenThread one_thread;
  const Case c{.mode = AttentionMode::kDense, .rows = 2};
  dist::Ranks one;
  World world(c, one);
  world.step(c, 2, one);
  const OwnedPiece* slot = nullptr;
  for (const OwnedPiece& each : world.optimizer.pieces())
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
