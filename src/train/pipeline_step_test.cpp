// Steps on a mesh of stages and data ranks leave what one rank leaves, and what is wrong on one is
// seen by all (docs/decisions/0031-pipeline.md).
#include <cmath>
#include <mutex>
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
#include "train/step.h"

namespace hadal::train {
namespace {

using model::AttentionMode;
using ops::Numerics;

struct Case {
  AttentionMode mode = AttentionMode::kSparse;
  Numerics numerics = Numerics::kIdeal;
  int64_t rows = 5;
};

/// Ranks are threads here, and all of them draw from LibTorch's one generator.
model::Transformer make_model(const Case& c) {
  static std::mutex generator;
  const std::lock_guard<std::mutex> lock(generator);
  const bool released = c.numerics == Numerics::kReleased;
  return testing::random_model(released ? testing::mini_config() : testing::tiny_config(), 4,
                               at::kFloat);
}

/// A rank of a mesh of stages: its layers, what it owns, its rows.
struct World {
  dist::Mesh mesh;
  dist::MeshPlace place;
  model::Transformer model;
  model::StageSplit split;
  Pipeline pipeline;
  Optimizer optimizer;

  World(const Case& c, int64_t stages, dist::Ranks& ranks)
      : mesh(ranks.size(), {.pipeline = stages}),
        place(mesh.place(ranks.rank())),
        model(make_model(c)),
        split(model.config(), model::balanced_layers(model.config(), stages, 48, "test"), "test"),
        pipeline(dist::Group(ranks, mesh.pipeline_group(ranks.rank()), dist::Axis::kPipeline),
                 split),
        optimizer(of_stage(), {}, Ownership(model, mesh, ranks.rank(), split)) {
    optimizer.hold_for(c.numerics, ranks);
  }

  model::Transformer& of_stage() {
    model::keep_stage(model, split, place.pipeline);
    model::require_gradients(model);
    return model;
  }
  StepOutcome step(const Case& c, dist::Ranks& ranks) {
    const StepShare share{.rows = row_share(c.rows, mesh.data(), place.data), .total = c.rows};
    std::vector<MicroBatch> batches;
    for (int64_t row = share.rows.begin; row < share.rows.end; ++row)
      batches.emplace_back(testing::packed_rows(row, 1, 48), at::Device(at::kCPU));
    const StepRules rules{.objective = {.balance_weight = 0.1,
                                        .mode = c.mode,
                                        .numerics = c.numerics,
                                        .count_clamps = true},
                          .learning_rate = 1e-3,
                          .clip_norm = 0.01,  // it clips: the norm moves everything
                          .router_bias_speed = 1e-3};
    return training_step(model, optimizer, batches, rules, share, ranks, &pipeline);
  }
};

/// Everything that some steps leave on a rank: tensors by name, undefined where another rank has
/// them.
struct Left {
  std::vector<std::pair<std::string, at::Tensor>> measures, values;
  std::vector<StateTensor> state;
};

void add_measures(const StepOutcome& outcome, Left& left) {
  const StepMeasures& m = outcome.measures;
  left.measures.insert(left.measures.end(), {{"main", m.main_loss},
                                             {"mtp", m.mtp_loss},
                                             {"balance", m.balance_loss},
                                             {"index", m.index_loss},
                                             {"clamped", m.clamped},
                                             {"norm", at::full({}, outcome.norm, at::kDouble)}});
  for (const at::Tensor& load : m.expert_load) left.measures.emplace_back("load", load);
  EXPECT_TRUE(outcome.moved);
}

Left steps(const Case& c, int64_t stages, dist::Ranks& ranks) {
  World world(c, stages, ranks);
  Left left;
  for (int step = 0; step < 2; ++step) add_measures(world.step(c, ranks), left);
  const at::NoGradGuard no_grad;
  world.model.visit([&](const model::Parameter& p) {
    const bool table = p.kind == model::ParamKind::kHashTable;
    at::Tensor value;
    if (!p.elsewhere) value = table ? p.value : p.operand(c.numerics).detach().clone();
    left.values.emplace_back(p.name, value);
  });
  for (size_t slot = 0; slot < world.optimizer.slots().size(); ++slot)
    left.state.push_back(world.optimizer.masters(slot));
  for (StateTensor& moments : world.optimizer.state()) left.state.push_back(std::move(moments));
  return left;
}

void expect_same(const Left& whole, const Left& found, const std::string& what, int64_t& elements) {
  ASSERT_EQ(whole.measures.size(), found.measures.size());
  for (size_t i = 0; i < whole.measures.size(); ++i) {
    const auto& [name, expected] = whole.measures[i];
    ASSERT_EQ(expected.defined(), found.measures[i].second.defined()) << what << ": " << name;
    if (!expected.defined()) continue;
    EXPECT_TRUE(testing::same_bits(expected, found.measures[i].second)) << what << ": " << name;
  }
  ASSERT_EQ(whole.values.size(), found.values.size());
  for (size_t i = 0; i < whole.values.size(); ++i) {
    if (!found.values[i].second.defined()) continue;
    EXPECT_TRUE(testing::same_bits(whole.values[i].second, found.values[i].second))
        << what << ": " << whole.values[i].first;
  }
  ASSERT_EQ(whole.state.size(), found.state.size());
  for (size_t i = 0; i < whole.state.size(); ++i) {
    const at::Tensor& all = whole.state[i].parts.at(0).values;
    for (const StateTensor::Part& part : found.state[i].parts) {
      elements += part.values.numel();
      EXPECT_TRUE(testing::same_bits(all.narrow(0, part.begin, part.values.numel()), part.values))
          << what << ": " << whole.state[i].name << " from " << part.begin;
    }
  }
}

class AnyMesh : public ::testing::TestWithParam<std::tuple<AttentionMode, Numerics>> {};

TEST_P(AnyMesh, LeavesTheBitsOfOneRank) {
  const testing::OneAtenThread one_thread;
  const Case c{.mode = std::get<0>(GetParam()), .numerics = std::get<1>(GetParam())};
  dist::Ranks one;
  const Left whole = steps(c, 1, one);
  int64_t all = 0;
  for (const StateTensor& tensor : whole.state) all += tensor.whole.numel();
  for (const auto& [stages, data] :
       std::vector<std::pair<int64_t, int64_t>>{{2, 1}, {2, 2}, {4, 1}, {1, 2}}) {
    std::vector<int64_t> elements(static_cast<size_t>(stages * data), 0);
    const auto errors = testing::run_ranks(stages * data, [&](dist::Ranks& ranks) {
      const Left found = steps(c, stages, ranks);
      expect_same(whole, found, concat("rank ", ranks.rank(), " of ", stages, " x ", data),
                  elements[static_cast<size_t>(ranks.rank())]);
    });
    for (const std::string& error : errors) ASSERT_EQ(error, "");
    int64_t sum = 0;
    for (const int64_t own : elements) sum += own;
    EXPECT_EQ(sum, all) << "every element has one owner";
  }
}

INSTANTIATE_TEST_SUITE_P(Modes,
                         AnyMesh,
                         ::testing::Values(std::tuple(AttentionMode::kIndexerWarmup,
                                                      Numerics::kIdeal),
                                           std::tuple(AttentionMode::kSparse, Numerics::kBf16),
                                           std::tuple(AttentionMode::kDense, Numerics::kReleased)));

// What another stage has is not in a rank's memory.
TEST(PipelineMemory, HoldsTheParametersOfItsStageAlone) {
  const testing::OneAtenThread one_thread;
  const Case c{.numerics = Numerics::kBf16};
  std::vector<int64_t> held(4, 0);
  int64_t all = 0;
  make_model(c).visit([&](const model::Parameter& p) { all += p.value.numel(); });
  const auto errors = testing::run_ranks(4, [&](dist::Ranks& ranks) {
    World world(c, 4, ranks);
    const auto rank = static_cast<size_t>(ranks.rank());
    world.model.visit([&](const model::Parameter& p) {
      EXPECT_NE(p.elsewhere, p.value.defined()) << p.name;
      if (p.value.defined()) held[rank] += p.value.numel();
    });
    for (const OwnedPiece& own : world.optimizer.pieces())
      EXPECT_FALSE(own.parameter->elsewhere) << own.parameter->name;
  });
  for (const std::string& error : errors) EXPECT_EQ(error, "");
  EXPECT_EQ(held[0] + held[1] + held[2] + held[3], all);
  for (const int64_t own : held) EXPECT_LT(own, all / 2);
}

// A rank whose memory is damaged: everybody leaves the step out and names it.
TEST(PipelineNotFinite, IsSeenByAllAndNamed) {
  const testing::OneAtenThread one_thread;
  const Case c{.mode = AttentionMode::kDense, .rows = 4};
  // Two stages of two data ranks: rank = 2 stage + data.
  for (const auto& [broken, where] : std::vector<std::pair<int64_t, std::string>>{
           {1, "layers.0.attn_norm.weight"}, {2, "norm.weight"}}) {
    const auto errors = testing::run_ranks(4, [&](dist::Ranks& ranks) {
      World world(c, 2, ranks);
      std::vector<at::Tensor> before;
      world.model.visit([&](model::Parameter& p) {
        if (p.elsewhere) return;
        if (p.name == where && ranks.rank() == broken) {
          const at::NoGradGuard no_grad;
          p.value[3] = std::nanf("");
        }
        before.push_back(p.value.detach().clone());
      });
      const StepOutcome outcome = world.step(c, ranks);
      EXPECT_FALSE(outcome.moved);
      // The rows of one data rank, on both of its stages.
      ASSERT_EQ(outcome.not_finite.size(), 2U);
      const int64_t data = broken % 2;
      for (int64_t stage = 0; stage < 2; ++stage) {
        const std::string& name = outcome.not_finite[static_cast<size_t>(stage)];
        EXPECT_EQ(name.rfind(concat("rank ", 2 * stage + data, ": "), 0), 0U) << name;
      }
      size_t at = 0;
      world.model.visit([&](const model::Parameter& p) {
        if (p.elsewhere) return;
        EXPECT_TRUE(testing::same_bits(before[at++], p.value.detach())) << p.name;
      });
    });
    for (const std::string& error : errors) EXPECT_EQ(error, "");
  }
}

}  // namespace
}  // namespace hadal::train
