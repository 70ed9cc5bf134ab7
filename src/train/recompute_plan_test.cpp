// What a pass is predicted to hold against what it holds, and the choice that fits a budget.
#include "train/recompute_plan.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/thread_time.h"
#include "model/init.h"
#include "ops/tensor_memory.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"

namespace hadal::train {
namespace {

using model::AttentionMode;
using ops::Numerics;
using ops::TensorLabel;

/// One row of several samples through a small model, whose activations are most of what it holds.
class RecomputePlanTest : public ::testing::Test {
 protected:
  static constexpr int64_t kTokens = 512;

  void SetUp() override {
    ops::count_tensor_memory();
    model_ = std::make_unique<model::Transformer>(
        testing::random_model(testing::mini_config(), 4, at::kFloat));
    model::require_gradients(*model_);
    params_.mode = AttentionMode::kSparse;
    params_.balance_weight = 0.2;
    micro_ = std::make_unique<MicroBatch>(row(), at::Device(at::kCPU));
  }
  static PackedRows row() {
    PackedRows packed{.rows = 1,
                      .row_length = kTokens,
                      .tokens = {},
                      .scored = std::vector<uint8_t>(kTokens, 1),
                      .sample_lengths = {300, 12, kTokens - 312}};
    at::manual_seed(5);
    const at::Tensor ids = at::randint(128, {kTokens}, at::kInt);
    packed.tokens.assign(ids.data_ptr<int32_t>(), ids.data_ptr<int32_t>() + ids.numel());
    return packed;
  }

  struct Run {
    int64_t peak = 0;  ///< above what was there before
    double seconds = 0.0;
    std::vector<at::Tensor> gradients;
  };
  Run run(const ObjectiveParams& params) {
    StepCounts counts;
    counts.add(*micro_, model_->config());
    const int64_t before = ops::tensor_bytes();
    ops::reset_tensor_peak();
    const auto start = thread_time();
    Run result;
    {
      StepMeasures measures;
      accumulate(*model_, *micro_, counts, params, measures);
    }
    result.seconds = std::chrono::duration<double>(thread_time() - start).count();
    result.peak = ops::tensor_peak_bytes() - before;
    model_->visit([&](const model::Parameter& parameter) {
      result.gradients.push_back(parameter.value.grad());
      parameter.value.mutable_grad().reset();
    });
    return result;
  }
  Run run(const RecomputePlan& plan) {
    ObjectiveParams params = params_;
    plan.apply(params);
    return run(params);
  }
  RecomputePlan plan(RecomputePolicy policy, int64_t budget = 0) {
    return plan_recompute(*model_, {.layers = model::all_layers(model_->config())}, *micro_,
                          params_, {.policy = policy, .budget_bytes = budget}, memory_,
                          "run.json: recompute.budget_bytes");
  }
  static void expect_same(const Run& a, const Run& b) {
    ASSERT_EQ(a.gradients.size(), b.gradients.size());
    for (size_t i = 0; i < a.gradients.size(); ++i) {
      ASSERT_EQ(a.gradients[i].defined(), b.gradients[i].defined());
      if (a.gradients[i].defined()) {
        EXPECT_TRUE(at::equal(a.gradients[i], b.gradients[i])) << i;
      }
    }
  }
  static void expect_near(int64_t predicted, int64_t measured, const std::string& what) {
    EXPECT_LE(std::abs(static_cast<double>(predicted - measured)),
              0.05 * static_cast<double>(measured))
        << what << ": predicted " << predicted << ", measured " << measured;
  }

  const testing::OneAtenThread one_thread_;
  std::unique_ptr<model::Transformer> model_;
  std::unique_ptr<MicroBatch> micro_;
  ObjectiveParams params_;
  StepMemory memory_;  ///< nothing but the pass
};

// The first of three stages of a pipeline: two rows wait between their passes while a third one's
// runs.
TEST_F(RecomputePlanTest, AStageHoldsTheRowsUnderWay) {
  const model::LayerRun layers{.begin = 0, .end = 2, .first = true, .last = false};
  StepCounts counts;
  counts.add(*micro_, model_->config());
  int64_t one = 0;
  for (const RecomputePolicy policy :
       {RecomputePolicy::kNone, RecomputePolicy::kNorms, RecomputePolicy::kBlock}) {
    const auto plan_of = [&](int64_t under_way) {
      return plan_recompute(*model_, {.layers = layers, .under_way = under_way}, *micro_, params_,
                            {.policy = policy}, memory_, "test");
    };
    const RecomputePlan chosen = plan_of(3);
    ObjectiveParams params = params_;
    chosen.apply(params);
    const int64_t before = ops::tensor_bytes();
    ops::reset_tensor_peak();
    {
      std::vector<StagePass> rows;
      for (int row = 0; row < 3; ++row)
        rows.push_back(stage_forward(*model_, layers, *micro_, counts, params));
      stage_backward(rows[0], at::full_like(rows[0].out.streams, 1e-3),
                     at::full_like(rows[0].mtp_rows, 1e-3));
    }
    expect_near(chosen.pass_bytes, ops::tensor_peak_bytes() - before,
                recompute_policy_name(policy));
    model_->visit(
        [](const model::Parameter& parameter) { parameter.value.mutable_grad().reset(); });
    if (policy == RecomputePolicy::kNone) one = plan_of(1).pass_bytes;
  }
  EXPECT_GT(plan(RecomputePolicy::kNone).pass_bytes, one) << "all layers hold more than two";
}

TEST_F(RecomputePlanTest, EveryPolicyHoldsWhatIsPredicted) {
  const Run plain = run(params_);
  int64_t of_norms = 0;
  for (const RecomputePolicy policy :
       {RecomputePolicy::kNone, RecomputePolicy::kNorms, RecomputePolicy::kBlock}) {
    const RecomputePlan chosen = plan(policy);
    const Run made = run(chosen);
    expect_near(chosen.pass_bytes, made.peak, recompute_policy_name(policy));
    expect_same(made, plain);
    if (policy == RecomputePolicy::kNone) {
      expect_near(made.peak, plain.peak, "none and no policy");
    } else {
      EXPECT_LT(made.peak, plain.peak);
    }
    if (policy == RecomputePolicy::kNorms) of_norms = made.peak;
    if (policy == RecomputePolicy::kBlock) {
      EXPECT_LT(made.peak, of_norms);
    }
  }
}

TEST_F(RecomputePlanTest, AnySubsetHoldsWhatIsPredicted) {
  ObjectiveParams params = params_;
  const auto trace = std::make_shared<PassTrace>();
  params.tape = std::make_shared<ops::TapeOptions>(ops::TapeOptions{.observer = trace});
  run(params);
  trace->stop();
  const PassMemory memory(*trace);
  std::mt19937 random(23);
  for (const double share : {0.0, 0.2, 0.5, 0.8, 1.0}) {
    std::set<TensorLabel> chosen;
    for (const PassMemory::Candidate& candidate : memory.candidates()) {
      for (const TensorLabel& label : candidate.labels) {
        if (std::generate_canonical<double, 24>(random) < share) chosen.insert(label);
      }
    }
    const auto drops = [&](const TensorLabel& label) { return chosen.contains(label); };
    params.tape = std::make_shared<ops::TapeOptions>(ops::TapeOptions{.drops = drops});
    expect_near(memory.predict(drops).peak_bytes, run(params).peak, concat("share ", share));
  }
}

TEST_F(RecomputePlanTest, AutoFitsHalfTheMemory) {
  const Run plain = run(params_);
  const int64_t budget = plain.peak / 2;
  const RecomputePlan half = plan(RecomputePolicy::kAuto, budget);
  ASSERT_NE(half.tape, nullptr);
  EXPECT_LE(half.pass_bytes, budget);
  EXPECT_GT(half.chosen, 0);
  EXPECT_LT(half.chosen, half.candidates);
  // By turns; times are told, not judged.
  std::vector<double> ratios;
  for (int turn = 0; turn < 3; ++turn) {
    const Run again = run(half), kept = run(params_);
    expect_same(again, plain);
    expect_near(half.pass_bytes, again.peak, "auto");
    EXPECT_LE(again.peak, budget + budget / 20);
    ratios.push_back(again.seconds / kept.seconds);
  }
  std::ranges::sort(ratios);
  std::cout << "half the memory at " << ratios[1] << " times the processor time, predicted "
            << 1.0 + half.seconds_again / half.seconds_plain << '\n';
  // Where everything fits, nothing is recomputed.
  const RecomputePlan all = plan(RecomputePolicy::kAuto, plain.peak + plain.peak / 20);
  EXPECT_EQ(all.chosen, 0);
  EXPECT_EQ(all.tape, nullptr);
}

TEST_F(RecomputePlanTest, ABudgetThatNothingFitsNamesTheLeast) {
  std::string message;
  try {
    plan(RecomputePolicy::kAuto, 1000);
  } catch (const InputError& error) {
    message = error.what();
  }
  const std::string least_is = "the least that does is ";
  EXPECT_EQ(message.rfind("run.json: recompute.budget_bytes: 1 MiB do not hold a step: ", 0), 0U)
      << message;
  const size_t bytes = message.find('(');
  ASSERT_NE(message.find(least_is), std::string::npos) << message;
  ASSERT_NE(bytes, std::string::npos);
  // And that does fit.
  const int64_t least = std::stoll(message.substr(bytes + 1));
  const RecomputePlan fitting = plan(RecomputePolicy::kAuto, least + least / 100);
  EXPECT_LE(run(fitting).peak, least + least / 20);
}

TEST(StepMemory, SetsThatWaitAreTheTreesNodes) {
  EXPECT_EQ(waiting_sets(0, 1), 0);
  EXPECT_EQ(waiting_sets(0, 2), 1);
  EXPECT_EQ(waiting_sets(0, 4), 2);  // before row 3: {0, 1}, {2}
  EXPECT_EQ(waiting_sets(0, 7), 2);  // before row 3, 5 and 6: two
  EXPECT_EQ(waiting_sets(0, 8), 3);  // before row 7: {0..3}, {4, 5}, {6}
  EXPECT_EQ(waiting_sets(3, 6), 2);  // before row 5: {3}, {4}
  EXPECT_EQ(waiting_sets(4, 4), 0);
}

TEST(RecomputePolicies, UnknownOnesAreRefused) {
  for (const char* name : {"none", "norms", "block", "auto"})
    EXPECT_STREQ(recompute_policy_name(parse_recompute_policy(name, "x")), name);
  try {
    parse_recompute_policy("all", "run.json: recompute.policy");
    ADD_FAILURE() << "no error";
  } catch (const InputError& error) {
    EXPECT_STREQ(error.what(),
                 "run.json: recompute.policy: expected none, norms, block or auto, found \"all\"");
  }
}

}  // namespace
}  // namespace hadal::train
