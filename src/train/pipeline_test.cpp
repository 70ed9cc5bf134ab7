// A pipeline's step has the bits of one process (docs/decisions/0031-pipeline.md).
#include "train/pipeline.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/init.h"
#include "model/presets.h"
#include "testing/kernel_checks.h"
#include "testing/packed_rows.h"
#include "testing/rank_threads.h"
#include "testing/tiny_model.h"
#include "train/pipeline_schedule.h"
#include "train/schedule.h"

namespace hadal::train {
namespace {

using model::AttentionMode;
using ops::Numerics;
using Kind = PipelineAction::Kind;

/// What a pipeline does by its schedule, a forward pass in one unit of time, a backward pass in
/// two. A pass begins when its stage is free and its message is there.
struct Simulated {
  int64_t time = 0;           ///< when the last stage is done; -1: nobody can go on
  std::vector<int64_t> most;  ///< rows between their passes, by stage
};

Simulated simulate(int64_t stages, int64_t rows) {
  constexpr int64_t kNever = -1;
  const auto count = static_cast<size_t>(stages);
  const std::vector<int64_t> none(static_cast<size_t>(rows), kNever);
  std::vector<std::vector<int64_t>> forward(count, none), backward(count, none);
  std::vector<std::vector<PipelineAction>> actions;
  for (int64_t stage = 0; stage < stages; ++stage)
    actions.push_back(one_forward_one_backward(stages, stage, rows));
  std::vector<size_t> next(count, 0);
  std::vector<int64_t> free(count, 0), held(count, 0);
  Simulated result{.most = std::vector<int64_t>(count, 0)};
  for (bool moved = true; std::exchange(moved, false);) {
    for (size_t s = 0; s < count; ++s) {
      if (next[s] == actions[s].size()) continue;
      const auto [kind, row] = actions[s][next[s]];
      const auto r = static_cast<size_t>(row);
      const bool is_forward = kind == Kind::kForward;
      int64_t ready = 0;
      if (is_forward && s > 0) ready = forward[s - 1][r];
      if (!is_forward) ready = s + 1 < count ? backward[s + 1][r] : forward[s][r];
      if (ready == kNever || (!is_forward && forward[s][r] == kNever)) continue;
      free[s] = std::max(free[s], ready) + (is_forward ? 1 : 2);
      (is_forward ? forward : backward)[s][r] = free[s];
      held[s] += is_forward ? 1 : -1;
      result.most[s] = std::max(result.most[s], held[s]);
      ++next[s];
      moved = true;
    }
  }
  for (size_t s = 0; s < count; ++s) {
    if (next[s] < actions[s].size()) result.time = kNever;
    if (result.time != kNever) result.time = std::max(result.time, free[s]);
  }
  return result;
}

TEST(PipelineSchedule, EndsForAnyStagesAndRows) {
  for (int64_t stages = 1; stages <= 9; ++stages) {
    for (int64_t rows = 0; rows <= 20; ++rows) {
      const Simulated found = simulate(stages, rows);
      ASSERT_GE(found.time, 0) << stages << " stages wait for each other over " << rows << " rows";
      for (int64_t stage = 0; stage < stages; ++stage) {
        EXPECT_LE(found.most[static_cast<size_t>(stage)], stages - stage);
        EXPECT_EQ(found.most[static_cast<size_t>(stage)], std::min(rows, stages - stage));
      }
      if (rows == 0) continue;
      // The first stage waits for what the others have to fill and to drain, and no longer.
      EXPECT_EQ(found.time, 3 * (rows + stages - 1));
      const double waits = static_cast<double>(found.time - 3 * rows);
      EXPECT_DOUBLE_EQ(pipeline_bubble(stages, rows), waits / static_cast<double>(found.time));
    }
  }
}

TEST(PipelineSchedule, TakesEachRowOnceEachWayInOrder) {
  for (int64_t stages = 1; stages <= 6; ++stages) {
    for (int64_t stage = 0; stage < stages; ++stage) {
      for (int64_t rows = 0; rows <= 9; ++rows) {
        int64_t forward = 0, backward = 0;
        for (const auto& [kind, row] : one_forward_one_backward(stages, stage, rows)) {
          EXPECT_EQ(row, kind == Kind::kForward ? forward++ : backward++);
          EXPECT_LE(backward, forward);
        }
        EXPECT_EQ(forward, rows);
        EXPECT_EQ(backward, rows);
      }
    }
  }
  using Actions = std::vector<PipelineAction>;
  const auto f = [](int64_t row) { return PipelineAction{Kind::kForward, row}; };
  const auto b = [](int64_t row) { return PipelineAction{Kind::kBackward, row}; };
  EXPECT_EQ(one_forward_one_backward(3, 0, 4),
            (Actions{f(0), f(1), f(2), b(0), f(3), b(1), b(2), b(3)}));
  EXPECT_EQ(one_forward_one_backward(3, 2, 2), (Actions{f(0), b(0), f(1), b(1)}));
}

TEST(StageSplit, IsTheBestOfAll) {
  const model::ModelConfig config = testing::nano_config();
  const auto slowest = [&](const std::vector<int64_t>& layers) {
    const model::StageSplit split(config, layers, "test");
    double most = 0.0;
    for (int64_t stage = 0; stage < split.size(); ++stage)
      most = std::max(most, model::stage_flops(config, split.run(stage), 512));
    return most;
  };
  for (int64_t stages = 1; stages <= config.n_layers; ++stages) {
    const std::vector<int64_t> found = model::balanced_layers(config, stages, 512, "test");
    ASSERT_EQ(std::ssize(found), stages);
    // Every way to cut the layers: a bit for each place between two.
    double least = std::numeric_limits<double>::infinity();
    for (int64_t cuts = 0; cuts < int64_t{1} << (config.n_layers - 1); ++cuts) {
      std::vector<int64_t> layers{1};
      for (int64_t place = 0; place + 1 < config.n_layers; ++place)
        (cuts >> place & 1) != 0 ? layers.push_back(1) : void(++layers.back());
      if (std::ssize(layers) == stages) least = std::min(least, slowest(layers));
    }
    EXPECT_DOUBLE_EQ(slowest(found), least) << stages << " stages";
  }
}

TEST(StageSplit, GivesEveryParameterOneStage) {
  model::Transformer model(testing::tiny_config());
  const model::StageSplit split(model.config(), {1, 3, 1}, "test");
  size_t at = 0;
  const auto& stages = split.stage_of_parameters();
  model.visit([&](const model::Parameter& parameter) {
    int64_t expected = 2;  // norm, head, mHC behind the streams, MTP
    if (parameter.name == "embed.weight" || parameter.name.rfind("layers.0.", 0) == 0) expected = 0;
    for (const char* layer : {"layers.1.", "layers.2.", "layers.3."})
      if (parameter.name.rfind(layer, 0) == 0) expected = 1;
    EXPECT_EQ(stages.at(at++), expected) << parameter.name;
  });
  EXPECT_EQ(at, stages.size());
  EXPECT_EQ(split.stage_of_block(0), 0);
  EXPECT_EQ(split.stage_of_block(3), 1);
  EXPECT_EQ(split.stage_of_block(5), 2);
}

TEST(StageSplit, SaysWhatDoesNotFit) {
  const model::ModelConfig config = testing::tiny_config();
  const auto error = [](const auto& call) -> std::string {
    try {
      call();
    } catch (const InputError& e) {
      return e.what();
    }
    return "";
  };
  const auto split = [&](std::vector<int64_t> layers) {
    return error([&] { model::StageSplit(config, layers, "run.json: mesh.layers"); });
  };
  EXPECT_EQ(split({2, 2}),
            "run.json: mesh.layers: expected the model's 5 layers, found [2, 2], which are 4");
  EXPECT_EQ(split({5, 0}),
            "run.json: mesh.layers: expected a layer or more on every stage, found [5, 0]");
  EXPECT_EQ(split({}), "run.json: mesh.layers: expected layers of each stage, found none");
  EXPECT_EQ(error([&] { model::balanced_layers(config, 6, 64, "run.json: mesh.pipeline"); }),
            "run.json: mesh.pipeline: expected 1 to 5 stages, a layer or more on each, found 6");
}

struct Case {
  AttentionMode mode = AttentionMode::kSparse;
  Numerics numerics = Numerics::kIdeal;
  int64_t rows = 5;
  double mtp_weight = 0.3;
  bool recompute = false;      ///< blocks
  bool recompute_all = false;  ///< every annotated tensor
  at::ScalarType type = at::kFloat;
};

/// Ranks are threads here, and all of them draw from LibTorch's one generator.
model::Transformer make_model(const Case& c) {
  static std::mutex generator;
  const std::lock_guard<std::mutex> lock(generator);
  const bool released = c.numerics == Numerics::kReleased;
  model::Transformer model =
      testing::random_model(released ? testing::mini_config() : testing::tiny_config(), 4, c.type);
  return model;
}

ObjectiveParams objective(const Case& c) {
  ObjectiveParams params{.mtp_weight = c.mtp_weight,
                         .balance_weight = 0.1,
                         .mode = c.mode,
                         .numerics = c.numerics,
                         .count_clamps = true,
                         .recompute = c.recompute};
  if (c.recompute_all)
    params.tape = std::make_shared<ops::TapeOptions>(ops::TapeOptions{.verify = true});
  return params;
}

std::vector<MicroBatch> batches_of(const Case& c, int64_t micro_rows) {
  std::vector<MicroBatch> batches;
  for (int64_t row = 0; row < c.rows; row += micro_rows)
    batches.emplace_back(testing::packed_rows(row, std::min(micro_rows, c.rows - row), 48),
                         at::Device(at::kCPU));
  return batches;
}

struct Found {
  std::vector<at::Tensor> gradients;  ///< by parameter that takes one; undefined on other stages
  StepMeasures measures;
};

StepCounts counts_of(const std::vector<MicroBatch>& batches, const model::ModelConfig& config) {
  StepCounts counts;
  for (const MicroBatch& batch : batches) counts.add(batch, config);
  return counts;
}

Found gradients_of(const model::Transformer& model, StepMeasures measures) {
  Found found{.gradients = {}, .measures = std::move(measures)};
  model.visit([&](const model::Parameter& parameter) {
    if (parameter.trainable())
      found.gradients.push_back(parameter.value.defined() ? parameter.value.grad() : at::Tensor());
  });
  return found;
}

Found whole_step(const Case& c) {
  model::Transformer model = make_model(c);
  model::require_gradients(model);
  const std::vector<MicroBatch> batches = batches_of(c, c.rows);
  const StepCounts counts = counts_of(batches, model.config());
  StepSums sums(model);
  for (const MicroBatch& batch : batches) accumulate(model, batch, counts, objective(c), sums);
  return gradients_of(model, sums.finish());
}

Pipeline pipeline_over(dist::Ranks& ranks, const model::Transformer& model) {
  std::vector<int64_t> members(static_cast<size_t>(ranks.size()));
  std::iota(members.begin(), members.end(), int64_t{0});
  return {
      dist::Group(ranks, members, dist::Axis::kPipeline),
      model::StageSplit(model.config(),
                        model::balanced_layers(model.config(), ranks.size(), 48, "test"), "test")};
}

model::Transformer stage_model(const Case& c, const Pipeline& pipeline) {
  model::Transformer model = make_model(c);
  model::keep_stage(model, pipeline.split(), pipeline.stage());
  model::require_gradients(model);
  return model;
}

Found stage_step(const Case& c, int64_t micro_rows, dist::Ranks& ranks) {
  Pipeline pipeline = pipeline_over(ranks, make_model(c));
  const model::Transformer model = stage_model(c, pipeline);
  const std::vector<MicroBatch> batches = batches_of(c, micro_rows);
  const StepCounts counts = counts_of(batches, model.config());
  StepSums sums(model);
  pipeline.accumulate(model, passes_of(batches), counts, objective(c), sums);
  return gradients_of(model, sums.finish());
}

void expect_same(const at::Tensor& expected, const at::Tensor& found, const std::string& what) {
  ASSERT_EQ(expected.defined(), found.defined()) << what;
  if (!expected.defined()) return;
  EXPECT_TRUE(testing::same_bits(expected, found)) << what;
}

/// The stages together have what one process has, each tensor once.
void expect_whole(const Found& whole, const std::vector<Found>& stages) {
  for (size_t p = 0; p < whole.gradients.size(); ++p) {
    at::Tensor gradient;
    for (const Found& stage : stages) {
      if (!stage.gradients[p].defined()) continue;
      EXPECT_FALSE(gradient.defined()) << "parameter " << p << " has two stages";
      gradient = stage.gradients[p];
    }
    expect_same(whole.gradients[p], gradient, concat("gradient ", p));
  }
  const StepMeasures& last = stages.back().measures;
  expect_same(whole.measures.main_loss, last.main_loss, "main loss");
  expect_same(whole.measures.mtp_loss, last.mtp_loss, "MTP loss");
  expect_same(whole.measures.balance_loss, last.balance_loss, "balance loss");
  expect_same(whole.measures.index_loss, last.index_loss, "index loss");
  StepMeasures together;
  for (size_t s = 0; s < stages.size(); ++s) {
    StepMeasures measures = stages[s].measures;
    if (s + 1 < stages.size()) {
      EXPECT_FALSE(measures.main_loss.defined() || measures.mtp_loss.defined() ||
                   measures.balance_loss.defined() || measures.index_loss.defined());
    }
    together.add(measures);
  }
  expect_same(whole.measures.clamped, together.clamped, "clamped");
  ASSERT_EQ(whole.measures.expert_load.size(), together.expert_load.size());
  for (size_t b = 0; b < together.expert_load.size(); ++b)
    expect_same(whole.measures.expert_load[b], together.expert_load[b], concat("load ", b));
}

void expect_bits_of_one(const Case& c) {
  const testing::OneAtenThread one_thread;
  const Found whole = whole_step(c);
  for (const auto& [stages, micro_rows] :
       std::vector<std::pair<int64_t, int64_t>>{{2, 1}, {4, 2}, {1, 2}}) {
    std::vector<Found> found(static_cast<size_t>(stages));
    const auto errors = testing::run_ranks(stages, [&](dist::Ranks& ranks) {
      found[static_cast<size_t>(ranks.rank())] = stage_step(c, micro_rows, ranks);
    });
    for (const std::string& error : errors) ASSERT_EQ(error, "");
    SCOPED_TRACE(concat(stages, " stages"));
    expect_whole(whole, found);
  }
}

class AnyStages : public ::testing::TestWithParam<std::tuple<AttentionMode, Numerics>> {};

TEST_P(AnyStages, GiveTheBitsOfOne) {
  const auto [mode, numerics] = GetParam();
  expect_bits_of_one({.mode = mode, .numerics = numerics});
}

INSTANTIATE_TEST_SUITE_P(Modes,
                         AnyStages,
                         ::testing::Values(std::tuple(AttentionMode::kDense, Numerics::kIdeal),
                                           std::tuple(AttentionMode::kIndexerWarmup,
                                                      Numerics::kBf16),
                                           std::tuple(AttentionMode::kSparse, Numerics::kBf16),
                                           std::tuple(AttentionMode::kSparse, Numerics::kReleased)),
                         [](const auto& c) {
                           return std::string(attention_mode_name(std::get<0>(c.param))) + "_" +
                                  ops::numerics_name(std::get<1>(c.param));
                         });

// One row: all stages but one wait. Three: fewer than four stages need to be busy.
TEST(Pipeline, TakesFewRows) {
  for (const int64_t rows : {1, 3})
    expect_bits_of_one({.mode = AttentionMode::kSparse, .numerics = Numerics::kBf16, .rows = rows});
}

TEST(Pipeline, WithoutMtpSendsNoRows) {
  expect_bits_of_one({.mode = AttentionMode::kDense, .mtp_weight = 0.0});
}

TEST(Pipeline, InFp64) {
  expect_bits_of_one({.mode = AttentionMode::kSparse, .rows = 2, .type = at::kDouble});
}

// Several rows are between their passes, each with a tape of its own.
TEST(Pipeline, RecomputesWithinAStage) {
  expect_bits_of_one({.numerics = Numerics::kBf16, .rows = 4, .recompute = true});
  expect_bits_of_one({.numerics = Numerics::kReleased, .rows = 4, .recompute_all = true});
}

TEST(Pipeline, EvaluatesToTheBitsOfOne) {
  const testing::OneAtenThread one_thread;
  for (const AttentionMode mode : {AttentionMode::kDense, AttentionMode::kSparse}) {
    const Case c{.mode = mode, .numerics = Numerics::kBf16, .rows = 6};
    const model::Transformer model = make_model(c);
    const std::vector<MicroBatch> batches = batches_of(c, 2);
    std::vector<Evaluation> expected;
    for (const MicroBatch* row : passes_of(batches))
      evaluate(model, *row, c.mode, c.numerics, expected.emplace_back());
    for (const int64_t stages : {2, 4}) {
      std::vector<std::vector<Evaluation>> found(static_cast<size_t>(stages));
      const auto errors = testing::run_ranks(stages, [&](dist::Ranks& ranks) {
        Pipeline pipeline = pipeline_over(ranks, model);
        const model::Transformer own = stage_model(c, pipeline);
        found[static_cast<size_t>(ranks.rank())] =
            pipeline.evaluate(own, passes_of(batches), c.mode, c.numerics);
      });
      for (const std::string& error : errors) ASSERT_EQ(error, "");
      for (size_t s = 0; s + 1 < found.size(); ++s) EXPECT_TRUE(found[s].empty());
      ASSERT_EQ(found.back().size(), expected.size());
      int64_t queries = 0;
      for (size_t row = 0; row < expected.size(); ++row) {
        const Evaluation &a = expected[row], &b = found.back()[row];
        EXPECT_EQ(a.loss_sum, b.loss_sum);
        EXPECT_EQ(a.targets, b.targets);
        EXPECT_EQ(a.mass_sum, b.mass_sum);
        EXPECT_EQ(a.best_mass_sum, b.best_mass_sum);
        EXPECT_EQ(a.mass_queries, b.mass_queries);
        queries += b.mass_queries;
      }
      EXPECT_EQ(queries > 0, mode == AttentionMode::kSparse);
    }
  }
}

// What the comparison above would not forgive: sums of the two uses of the embedding over rows,
// added at the end, are another number.
TEST(Pipeline, UsesOfTheEmbeddingMeetInTheirRow) {
  const testing::OneAtenThread one_thread;
  // Gradients in BF16 are so short that sums of a few of them are exact.
  const Case both{.mode = AttentionMode::kDense, .numerics = Numerics::kIdeal};
  const Found whole = whole_step(both);
  model::Transformer model = make_model(both);
  model::require_gradients(model);
  const std::vector<MicroBatch> batches = batches_of(both, 1);
  const StepCounts counts = counts_of(batches, model.config());
  const ObjectiveParams params = objective(both);
  const model::StageSplit split(model.config(), {2, 3}, "test");
  at::Tensor main_uses, mtp_uses;
  for (const MicroBatch& row : batches) {
    StagePass first = stage_forward(model, split.run(0), row, counts, params);
    StagePass last = stage_forward(model, split.run(1), row, counts, params,
                                   {.streams = first.out.streams.detach(),
                                    .balance = first.out.balance,
                                    .index = first.out.index},
                                   first.mtp_rows.detach());
    stage_backward(last);
    at::Tensor embedding;
    model.visit([&](const model::Parameter& parameter) {
      if (parameter.kind == model::ParamKind::kEmbedding) embedding = parameter.value;
    });
    const auto take = [&](at::Tensor& sum) {
      add_in_place(sum, embedding.grad().clone());
      embedding.mutable_grad().reset();
    };
    ASSERT_FALSE(embedding.grad().defined());
    stage_backward(first, last.in.streams.grad());
    take(main_uses);
    const at::Tensor again = model.embedding_rows(row.next_ids, params.numerics);
    again.backward(last.mtp_rows.grad());
    take(mtp_uses);
  }
  const at::Tensor apart = main_uses + mtp_uses;
  EXPECT_FALSE(testing::same_bits(whole.gradients[0], apart));
  EXPECT_LT((whole.gradients[0] - apart).abs().max().item<float>(), 1e-4f);
}

}  // namespace
}  // namespace hadal::train
