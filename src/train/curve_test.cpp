// Twenty steps of training: the same bits twice, and in FP32 the curve of a float64 run that lies
// beside this file (curve_f64.json; hadal itself wrote it, so it tells precision and drift, not
// whether the mathematics is right: gradient_test.cpp and the recorded checkpoints do that).
//
// To write it anew after a change of the mathematics:
//   model_test --gtest_also_run_disabled_tests --gtest_filter='*WriteFloat64Curve'
#include <cmath>
#include <cstdio>
#include <map>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"
#include "base/philox.h"
#include "model/init.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"
#include "train/objective.h"
#include "train/optimizer.h"

namespace hadal::train {
namespace {

constexpr int kSteps = 20;
const std::string kCurveFile = std::string(HADAL_SOURCE_DIR) + "/src/train/curve_f64.json";

/// Steps 0 to 9 dense, 10 and 11 indexer warm-up, the rest sparse with a choice that binds.
model::AttentionMode mode_at(int step) {
  return step < 10   ? model::AttentionMode::kDense
         : step < 12 ? model::AttentionMode::kIndexerWarmup
                     : model::AttentionMode::kSparse;
}

/// Four rows of 64 tokens that a model can learn something about: each token follows its
/// predecessor by one of two rules.
PackedRows rows_at(int step, int64_t vocab) {
  PackedRows packed{.rows = 4,
                    .row_length = 64,
                    .tokens = {},
                    .scored = std::vector<uint8_t>(256, 1),
                    .sample_lengths = {64, 40, 24, 64, 64}};
  const Philox random(17, static_cast<uint64_t>(step));
  int64_t token = step;
  for (uint64_t i = 0; i < 256; ++i) {
    token = (random.block(i)[0] % 4 == 0 ? 5 * token + 1 : token + 3) % vocab;
    packed.tokens.push_back(static_cast<int32_t>(token));
  }
  return packed;
}

using Curve = std::map<std::string, std::vector<double>>;

struct Trained {
  Curve curve;
  std::vector<at::Tensor> weights;
};

Trained train(at::ScalarType type) {
  const testing::OneAtenThread one_thread;
  const model::ModelConfig config = testing::tiny_config();
  model::Transformer model(config);
  // Both precisions begin with the same FP32 values.
  model::init_weights(model, {.seed = 3, .std = 0.05, .token_counts = {}}, at::kFloat);
  model.visit([&](model::Parameter& p) {
    if (p.value.is_floating_point()) p.value = p.value.to(type);
  });
  model::require_gradients(model);
  Optimizer optimizer(model, {});
  Trained run;
  for (int step = 0; step < kSteps; ++step) {
    const MicroBatch micro(rows_at(step, config.vocab_size), at::Device(at::kCPU));
    StepCounts counts;
    counts.add(micro, config);
    StepMeasures measures;
    optimizer.zero_grad();
    accumulate(model, micro, counts, {.mode = mode_at(step), .numerics = ops::Numerics::kIdeal},
               measures);
    const double norm = optimizer.clip_gradients(1.0).item<double>();
    optimizer.step(2e-3 * std::min(1.0, (step + 1) / 5.0));
    update_router_bias(model, measures, 1e-3);
    run.curve["main"].push_back(measures.main_loss.item<double>());
    run.curve["mtp"].push_back(measures.mtp_loss.item<double>());
    run.curve["balance"].push_back(measures.balance_loss.item<double>());
    run.curve["index"].push_back(measures.index_loss.defined() ? measures.index_loss.item<double>()
                                                               : 0.0);
    run.curve["grad_norm"].push_back(norm);
  }
  model.visit([&](model::Parameter& p) { run.weights.push_back(p.value.detach()); });
  return run;
}

TEST(TrainingCurve, TwoRunsAreTheSameBitsAndFollowTheFloat64Curve) {
  const Trained first = train(at::kFloat), second = train(at::kFloat);
  EXPECT_TRUE(first.curve == second.curve);
  ASSERT_EQ(first.weights.size(), second.weights.size());
  for (size_t i = 0; i < first.weights.size(); ++i) {
    EXPECT_TRUE(testing::same_bits(first.weights[i], second.weights[i])) << i;
  }
  const JsonObject stored = JsonObject::load(kCurveFile);
  for (const auto& [name, values] : first.curve) {
    const std::vector<double> expected = stored.numbers(name);
    ASSERT_EQ(expected.size(), values.size()) << name;
    double worst = 0.0;
    for (size_t step = 0; step < values.size(); ++step) {
      const double error = std::abs(values[step] - expected[step]);
      // Losses are of order one; the norm is compared relatively.
      const double bar = name == "grad_norm" ? 1e-3 * expected[step] : 2e-5;
      EXPECT_LE(error, bar) << name << " at step " << step;
      worst = std::max(worst, error);
    }
    std::printf("%-10s from %.6f to %.6f, worst difference from float64 %.1e\n", name.c_str(),
                values.front(), values.back(), worst);
  }
  EXPECT_LT(first.curve.at("main").back(), first.curve.at("main").front() - 0.3);
}

TEST(TrainingCurve, DISABLED_WriteFloat64Curve) {
  JsonWriter out;
  out.begin_object();
  for (const auto& [name, values] : train(at::kDouble).curve) {
    out.key(name).begin_array();
    for (const double value : values) out.value(value);
    out.end_array();
  }
  write_file_atomic(kCurveFile, out.end_object().str());
}

}  // namespace
}  // namespace hadal::train
