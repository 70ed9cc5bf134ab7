#include <cstdio>
#include <cstdlib>
#include <functional>
#include <set>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/profiler_kineto.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/init.h"
#include "testing/gpu.h"
#include "testing/tiny_model.h"
#include "train/objective.h"
#include "train/optimizer.h"

namespace hadal::train {
namespace {

PackedRows random_rows(int64_t rows,
                       int64_t row_length,
                       int64_t vocab,
                       const std::vector<int64_t>& cut) {
  PackedRows packed{
      .rows = rows, .row_length = row_length, .tokens = {}, .scored = {}, .sample_lengths = {}};
  at::manual_seed(5);
  const at::Tensor ids = at::randint(vocab, {rows * row_length}, at::kInt);
  packed.tokens.assign(ids.data_ptr<int32_t>(), ids.data_ptr<int32_t>() + ids.numel());
  packed.scored.assign(packed.tokens.size(), 1);
  for (int64_t row = 0; row < rows; ++row) {
    packed.sample_lengths.insert(packed.sample_lengths.end(), cut.begin(), cut.end());
  }
  return packed;
}

struct StepResult {
  double main_loss = 0.0, index_loss = 0.0;
  std::vector<std::pair<std::string, at::Tensor>> grads;
};

StepResult one_step(model::Transformer& model,
                    const PackedRows& rows,
                    const ObjectiveParams& params,
                    at::Device device) {
  const MicroBatch micro(rows, device);
  StepCounts counts;
  counts.add(micro, model.config());
  StepMeasures measures;
  accumulate(model, micro, counts, params, measures);
  StepResult run;
  run.main_loss = measures.main_loss.item<double>();
  if (measures.index_loss.defined()) run.index_loss = measures.index_loss.item<double>();
  model.visit([&](model::Parameter& p) {
    if (p.value.grad().defined()) run.grads.emplace_back(p.name, p.value.grad().cpu());
    p.value.mutable_grad().reset();
  });
  return run;
}

// The whole step in BF16 on the GPU against FP32 on the CPU: same model, same batch, every
// attention mode.
TEST(TrainGpu, StepMatchesTheCpu) {
  for (const auto mode : {model::AttentionMode::kDense, model::AttentionMode::kSparse}) {
    const model::ModelConfig config = testing::small_config();
    model::Transformer cpu = testing::random_model(config, 3, at::kFloat);
    model::Transformer gpu = testing::random_model(config, 3, at::kFloat);
    model::move_to(gpu, at::Device(at::kCUDA));
    model::require_gradients(cpu);
    model::require_gradients(gpu);
    const PackedRows rows = random_rows(2, 512, config.vocab_size, {300, 7, 205});
    ObjectiveParams params{.mode = mode, .numerics = ops::Numerics::kIdeal};
    const StepResult expected = one_step(cpu, rows, params, at::Device(at::kCPU));
    const StepResult fp32 = one_step(gpu, rows, params, at::Device(at::kCUDA));
    EXPECT_NEAR(fp32.main_loss, expected.main_loss, 1e-4);
    params.numerics = ops::Numerics::kBf16;
    const StepResult bf16 = one_step(gpu, rows, params, at::Device(at::kCUDA));
    EXPECT_NEAR(bf16.main_loss, expected.main_loss, 0.02 * expected.main_loss);
    ASSERT_EQ(bf16.grads.size(), expected.grads.size());
    double worst = 0.0;
    std::string where;
    for (size_t i = 0; i < bf16.grads.size(); ++i) {
      const double error = testing::relative_error(bf16.grads[i].second, expected.grads[i].second);
      EXPECT_LT(testing::relative_error(fp32.grads[i].second, expected.grads[i].second), 2e-2)
          << fp32.grads[i].first;
      if (!(error <= worst)) {
        worst = error;
        where = bf16.grads[i].first;
      }
    }
    std::printf("mode %d: loss cpu %.5f gpu %.5f gpu bf16 %.5f, worst bf16 gradient %.3f (%s)\n",
                static_cast<int>(mode), expected.main_loss, fp32.main_loss, bf16.main_loss, worst,
                where.c_str());
  }
}

/// Runs `step` under LibTorch's profiler and writes a Chrome trace to the folder named by
/// HADAL_TRACE; without the variable nothing happens.
void trace(const std::string& name, const std::function<void()>& step) {
  const char* folder = std::getenv("HADAL_TRACE");
  if (folder == nullptr) return;
  namespace profiler = torch::autograd::profiler;
  namespace impl = torch::profiler::impl;
  const impl::ProfilerConfig config(impl::ProfilerState::KINETO);
  const std::set<impl::ActivityType> activities = {impl::ActivityType::CPU,
                                                   impl::ActivityType::CUDA};
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities);
  step();
  testing::synchronize();
  profiler::disableProfiler()->save(std::string(folder) + "/" + name + ".json");
}

struct ThroughputCase {
  model::AttentionMode mode;
  ops::Numerics numerics;
  int64_t rows;
};

TEST(TrainGpu, NanoThroughput) {
  using enum model::AttentionMode;
  using enum ops::Numerics;
  const at::Device device(at::kCUDA);
  for (const auto& [mode, numerics, micro_rows] : {ThroughputCase{kDense, kBf16, 8},
                                                   {kDense, kBf16, 16},
                                                   {kIndexerWarmup, kBf16, 8},
                                                   {kSparse, kBf16, 8},
                                                   {kSparse, kReleased, 8},
                                                   {kSparse, kReleased, 16}}) {
    model::Transformer model = testing::random_model(testing::nano_config(), 1, at::kFloat);
    model::move_to(model, device);
    model::require_gradients(model);
    Optimizer optimizer(model, {.low_precision_muon = true});
    const int64_t row_length = 4096;
    const PackedRows rows = random_rows(micro_rows, row_length, 8192, {1000, 2596, 500});
    const MicroBatch micro(rows, device);
    StepCounts counts;
    counts.add(micro, model.config());
    const ObjectiveParams params{.mode = mode, .numerics = numerics};
    const auto micro_step = [&] {
      StepMeasures measures;
      accumulate(model, micro, counts, params, measures);
    };
    const auto update = [&] {
      optimizer.clip_gradients(1.0);
      optimizer.step(1e-4);
    };
    const double micro_us = testing::median_us(micro_step, 5);
    const double step_us = testing::median_us(update, 5);
    const std::string name = hadal::concat("mode", static_cast<int>(mode), "-",
                                           ops::numerics_name(numerics), "-", micro_rows);
    trace(name, [&] {
      micro_step();
      update();
    });
    const double tokens = static_cast<double>(micro_rows * row_length);
    std::printf("%s: micro-batch of %.0f tokens %.1f ms = %.0f tokens/s; optimizer step %.1f ms\n",
                name.c_str(), tokens, micro_us * 1e-3, tokens / micro_us * 1e6, step_us * 1e-3);
  }
}

}  // namespace
}  // namespace hadal::train
