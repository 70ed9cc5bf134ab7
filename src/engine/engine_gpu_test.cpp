// The caches on a GPU: what goes through pages, slots, snapshots, copies and host bytes there gives
// the logits of the CPU, as nearly as the number format allows.
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAGraph.h>
#include <c10/core/InferenceMode.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "engine/kv_cache.h"
#include "engine/model_runner.h"
#include "engine/sampler.h"
#include "model/choices.h"
#include "model/init.h"
#include "ops/sampling/sample.h"
#include "testing/tiny_model.h"

namespace hadal::engine {
namespace {

using ops::Numerics;

struct Case {
  Numerics numerics;
  double tolerance;     ///< root mean square of what is apart, relative to that of the logits
  bool packed = false;  ///< matrices as the Hopper kernels read them
  bool wide = false;    ///< heads of the official width, which the attention kernel reads
};

model::ModelConfig config_of(const Case& c) {
  model::ModelConfig config = testing::small_config();
  config.expert_dtype = model::ExpertDtype::kFp4;
  if (c.wide) {
    config.head_dim = 512;
    config.n_heads = 64;
    config.o_groups = 8;
    config.index_n_heads = 8;
  }
  return config;
}

class EngineOnGpu : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "no CUDA device";
  }
  static model::Transformer make(at::Device device) {
    const Numerics numerics = GetParam().numerics;
    model::Transformer model(testing::random_model(config_of(GetParam()), 21, at::kFloat));
    model.visit([&](model::Parameter& p) {
      const bool rounded = p.is_matrix() || p.kind == model::ParamKind::kEmbedding ||
                           p.kind == model::ParamKind::kHead;
      if (rounded && numerics != Numerics::kIdeal) p.value = p.operand(numerics).contiguous();
      if (!GetParam().packed || !(p.is_matrix() || p.kind == model::ParamKind::kHead)) return;
      const bool codes = numerics == Numerics::kReleased;
      const ops::Weight dense(p.kind == model::ParamKind::kGroups
                                  ? p.value.reshape({p.units, -1, p.value.size(-1)})
                                  : p.value);
      auto packed = dense.to_sm90(codes ? p.storage : model::Storage::kBf16, p.role);
      ASSERT_TRUE(packed.has_value()) << p.name;
      p.hold(std::move(*packed));
    });
    model::move_to(model, device);
    return model;
  }
  static KvCacheOptions sizes(at::Device device) {
    return {.numerics = GetParam().numerics,
            .num_pages = 6,
            .num_slots = 3,
            .slack = 2,
            .device = device};
  }
  /// The logits of the last token of every piece.
  static std::vector<std::vector<float>> run(ModelRunner& runner,
                                             int64_t slot,
                                             std::span<const int64_t> tokens,
                                             int64_t start,
                                             const std::vector<int64_t>& pages,
                                             int64_t piece) {
    std::vector<std::vector<float>> rows;
    const auto end = static_cast<int64_t>(tokens.size());
    for (int64_t at = start; at < end; at += piece) {
      const int64_t count = std::min(piece, end - at);
      const engine_core::SequenceStep step{
          .slot = slot,
          .start = at,
          .tokens = tokens.subspan(static_cast<size_t>(at), static_cast<size_t>(count)),
          .pages = pages,
          .num_logits = 1,
          .shows_logits = true};
      runner.run({&step, 1});
      const auto logits = runner.logits(0, 0);
      rows.emplace_back(logits.begin(), logits.end());
    }
    return rows;
  }
  static void expect_near(const std::vector<float>& found, const std::vector<float>& wanted) {
    double size = 0, apart = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      size += std::pow(wanted[i], 2);
      apart += std::pow(found[i] - wanted[i], 2);
    }
    EXPECT_LE(std::sqrt(apart / size), GetParam().tolerance);
  }
};

TEST_P(EngineOnGpu, PagesSlotsAndSnapshotsGiveTheLogitsOfTheCpu) {
  std::mt19937 random(4);
  std::vector<int64_t> tokens(430);
  for (int64_t& id : tokens) id = static_cast<int64_t>(random() % 256);

  const model::Transformer on_cpu = make(at::kCPU);
  KvCache cpu_cache(on_cpu.config(), sizes(at::kCPU));
  ModelSampler sampler(0);  // nothing is drawn
  ModelRunner cpu(on_cpu, cpu_cache, sampler);
  const auto wanted = run(cpu, 0, tokens, 0, {0, 1}, 86);

  const model::Transformer on_gpu = make(at::kCUDA);
  KvCache cache(on_gpu.config(), sizes(at::kCUDA));
  EXPECT_EQ(cache.allocated_bytes(),
            6 * cache.page_bytes() + 3 * cache.state_bytes() + cache.spare_bytes());
  ModelRunner gpu(on_gpu, cache, sampler);
  const auto found = run(gpu, 1, tokens, 0, {4, 2}, 86);
  ASSERT_EQ(found.size(), wanted.size());
  for (size_t i = 0; i < found.size(); ++i) expect_near(found[i], wanted[i]);

  // Its state after 344 tokens, through the host into another slot and other pages.
  std::vector<std::byte> page(static_cast<size_t>(cache.page_bytes()));
  run(gpu, 1, std::span(tokens).first(344), 0, {4, 2}, 86);
  std::vector<std::byte> state(static_cast<size_t>(cache.snapshot_bytes(344)));
  cache.save_snapshot(1, 344, state);
  cache.read_page(4, page);
  cache.write_page(0, page);
  cache.copy_page(2, 5);
  cache.load_snapshot(2, 344, state);
  const auto resumed = run(gpu, 2, tokens, 344, {0, 5}, 86);
  EXPECT_EQ(resumed.back(), found.back());  // the same step of the same bytes
}

/// The numerics that have kernels: the reference, which `ideal` runs, asks for experts' borders.
class RecordedStep : public EngineOnGpu {};

// A recorded graph refuses whatever makes the host wait; replayed it computes the step of whatever
// tokens and rows lie at its addresses then.
TEST_P(RecordedStep, LayersCopyNothingToTheHost) {
  std::mt19937 random(5);
  std::vector<int64_t> tokens(300);
  for (int64_t& id : tokens) id = static_cast<int64_t>(random() % 256);
  const model::Transformer model = make(at::kCUDA);
  KvCache cache(model.config(), sizes(at::kCUDA));
  ModelSampler sampler(model.config().vocab_size);
  ModelRunner runner(model, cache, sampler);
  const std::vector<int64_t> pages = {4, 2};
  const c10::InferenceMode inference;
  for (const int64_t count : {1, 37}) {
    const int64_t start = 220;
    run(runner, 1, std::span(tokens).first(static_cast<size_t>(start)), 0, pages, 86);
    const auto part =
        std::span(tokens).subspan(static_cast<size_t>(start), static_cast<size_t>(count));
    const engine_core::SequenceStep step{.slot = 1, .start = start, .tokens = part, .pages = pages};
    const at::Tensor ids =
        at::tensor(std::vector<int64_t>(part.begin(), part.end()), at::kLong).to(at::kCUDA);
    const auto forward = [&](const ops::Batch& batch) {
      model::ForwardContext context;
      context.batch = &batch;
      context.numerics = GetParam().numerics;
      context.kv = &cache;
      return model.forward(ids, context).streams;
    };
    // A step overwrites rows that it would need a second time.
    std::vector<std::byte> state(static_cast<size_t>(cache.snapshot_bytes(start)));
    cache.save_snapshot(1, start, state);
    const auto restore = [&] { cache.load_snapshot(1, start, state); };
    const at::Tensor eager = forward(cache.begin({&step, 1}));
    restore();
    const at::Tensor again = forward(cache.begin({&step, 1}));  // everything settled
    EXPECT_TRUE(at::equal(eager, again));
    const c10::cuda::CUDAStream stream = c10::cuda::getStreamFromPool();
    const c10::cuda::CUDAStreamGuard guard(stream);
    restore();
    const ops::Batch batch = cache.begin({&step, 1});
    stream.synchronize();
    at::cuda::CUDAGraph graph;
    graph.capture_begin();
    const at::Tensor recorded = forward(batch);
    graph.capture_end();
    graph.replay();
    stream.synchronize();
    EXPECT_TRUE(at::equal(recorded, eager)) << count;
    // Another token where the first one lay.
    ids[0].fill_((tokens[static_cast<size_t>(start)] + 1) % 256);
    restore();
    graph.replay();
    stream.synchronize();
    EXPECT_FALSE(at::equal(recorded, eager));
    const at::Tensor other = recorded.clone();
    restore();
    EXPECT_TRUE(at::equal(forward(cache.begin({&step, 1})), other));
    // For whoever reads the output: what the step's kernels take one after the other.
    constexpr int kReplays = 100;
    stream.synchronize();
    const auto begin = std::chrono::steady_clock::now();
    for (int i = 0; i < kReplays; ++i) graph.replay();
    stream.synchronize();
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    std::printf("recorded step of %d tokens, %d layers: %.0f us\n", static_cast<int>(count),
                static_cast<int>(model.config().n_layers), took.count() / kReplays);
  }
}

/// Where every op that a token's company could touch is a Hopper kernel.
class KernelsAlone : public EngineOnGpu {};

TEST_P(KernelsAlone, ATokenKnowsNeitherItsCompanyNorItsChunks) {
  std::mt19937 random(6);
  std::vector<int64_t> tokens(300), others(300);
  for (int64_t& id : tokens) id = static_cast<int64_t>(random() % 256);
  for (int64_t& id : others) id = static_cast<int64_t>(random() % 256);
  const model::Transformer model = make(at::kCUDA);
  KvCache cache(model.config(), sizes(at::kCUDA));
  ModelSampler sampler(0);
  ModelRunner runner(model, cache, sampler);
  const std::vector<int64_t> pages = {4, 2}, other_pages = {0, 5};
  const auto wanted = run(runner, 1, tokens, 0, pages, 300).back();
  // Tokens one by one are recorded steps.
  for (const int64_t piece : {1, 7, 64, 100}) {
    EXPECT_EQ(run(runner, 2, tokens, 0, pages, piece).back(), wanted) << piece;
  }
  run(runner, 1, std::span(tokens).first(299), 0, pages, 86);
  EXPECT_EQ(run(runner, 1, tokens, 299, pages, 1).back(), wanted);
  // The last token once more, beside 250 tokens of another sequence.
  run(runner, 1, std::span(tokens).first(299), 0, pages, 299);
  const engine_core::SequenceStep steps[] = {{.slot = 0,
                                              .start = 0,
                                              .tokens = std::span(others).first(250),
                                              .pages = other_pages,
                                              .num_logits = 1,
                                              .shows_logits = true},
                                             {.slot = 1,
                                              .start = 299,
                                              .tokens = std::span(tokens).last(1),
                                              .pages = pages,
                                              .num_logits = 1,
                                              .shows_logits = true}};
  runner.run(steps);
  const auto found = runner.logits(1, 0);
  EXPECT_EQ(std::vector<float>(found.begin(), found.end()), wanted);
}

// Steps of several sequences at different places, recorded at the second of their kind.
TEST_P(KernelsAlone, RecordedStepsOfSeveralHaveTheBitsOfEach) {
  std::mt19937 random(9);
  std::vector<int64_t> tokens(300), others(300);
  for (int64_t& id : tokens) id = static_cast<int64_t>(random() % 256);
  for (int64_t& id : others) id = static_cast<int64_t>(random() % 256);
  const model::Transformer model = make(at::kCUDA);
  KvCache cache(model.config(), sizes(at::kCUDA));
  ModelSampler sampler(model.config().vocab_size);
  ModelRunner runner(model, cache, sampler);
  const std::vector<int64_t> pages = {4, 2}, other_pages = {0, 5};
  const auto wanted = run(runner, 1, tokens, 0, pages, 300).back();
  const auto other_wanted =
      run(runner, 0, std::span(others).first(271), 0, other_pages, 271).back();
  // 60 tokens of both, with 29 positions between them.
  run(runner, 1, std::span(tokens).first(240), 0, pages, 240);
  run(runner, 0, std::span(others).first(211), 0, other_pages, 211);
  std::vector<float> found, other_found;
  const Sampling sampling{.temperature = 1.0, .seed = 3};
  for (size_t i = 0; i < 60; ++i) {
    engine_core::Draw draw{.sampling = &sampling, .pos = static_cast<int64_t>(241 + i)};
    const engine_core::SequenceStep steps[] = {{.slot = 1,
                                                .start = static_cast<int64_t>(240 + i),
                                                .tokens = std::span(tokens).subspan(240 + i, 1),
                                                .pages = pages,
                                                .num_logits = 1,
                                                .draws = {&draw, 1},
                                                .shows_logits = true},
                                               {.slot = 0,
                                                .start = static_cast<int64_t>(211 + i),
                                                .tokens = std::span(others).subspan(211 + i, 1),
                                                .pages = other_pages,
                                                .num_logits = 1,
                                                .shows_logits = true}};
    const engine_core::StepResult result = runner.run(steps);
    const auto row = runner.logits(0, 0), other = runner.logits(1, 0);
    // Drawn on the card what the CPU draws from the same row.
    EXPECT_EQ(result.sequences[0].drawn[0].token, ops::sample_token(row, sampling, draw.pos)) << i;
    found.assign(row.begin(), row.end());
    other_found.assign(other.begin(), other.end());
  }
  EXPECT_EQ(found, wanted);
  EXPECT_EQ(other_found, other_wanted);
}

// Rows of a step that are not packed are those that a cache would pack.
TEST_P(KernelsAlone, AStepWithoutACacheHasTheBitsOfOneWithIt) {
  std::mt19937 random(7);
  std::vector<int64_t> tokens(300);
  for (int64_t& id : tokens) id = static_cast<int64_t>(random() % 256);
  const model::Transformer model = make(at::kCUDA);
  KvCache cache(model.config(), sizes(at::kCUDA));
  ModelSampler sampler(0);
  ModelRunner runner(model, cache, sampler);
  const auto wanted = run(runner, 1, tokens, 0, {4, 2}, 300).back();
  const ops::Batch batch({300}, {0}, at::kCUDA);
  const Numerics numerics = GetParam().numerics;
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics;
  const c10::InferenceMode inference;
  const at::Tensor streams =
      model.forward(at::tensor(tokens, at::kLong).to(at::kCUDA), context).streams;
  const at::Tensor row =
      model.logits(model.head_input(streams, numerics), numerics)[299].to(at::kCPU).contiguous();
  const float* found = row.const_data_ptr<float>();
  EXPECT_EQ(std::vector<float>(found, found + row.numel()), wanted);
}

/// Where another order of sums turns into other choices, which a comparison must not depend on.
class ForcedOnGpu : public EngineOnGpu {
 protected:
  struct Pass {
    at::Tensor logits;  ///< [tokens, vocab] on the CPU
    std::vector<model::BlockChoices> choices;
  };
  static Pass pass(at::Device device,
                   std::span<const int64_t> tokens,
                   std::vector<model::BlockChoices> forced) {
    const model::Transformer model = make(device);
    KvCache cache(model.config(), sizes(device));
    const std::vector<int64_t> pages = {4, 2};
    const engine_core::SequenceStep step{.slot = 1, .start = 0, .tokens = tokens, .pages = pages};
    const ops::Batch batch = cache.begin({&step, 1});
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = GetParam().numerics;
    context.kv = &cache;
    context.request.experts = context.request.selection = true;
    context.forced = std::move(forced);
    const c10::InferenceMode inference;
    const at::Tensor ids =
        at::tensor(std::vector<int64_t>(tokens.begin(), tokens.end()), at::kLong).to(device);
    const model::ForwardOutput out = model.forward(ids, context);
    Pass result;
    for (size_t block = 0; block < out.aux.size(); ++block) {
      result.choices.push_back(
          model::choices_of(out.aux[block], model.config(), static_cast<int64_t>(block), batch));
    }
    result.logits = model.logits(model.head_input(out.streams, context.numerics), context.numerics)
                        .to(at::kCPU, at::kDouble);
    return result;
  }
};

// The kernels against the CPU, of whose choices of experts and blocks nothing differs.
TEST_P(ForcedOnGpu, TheSameChoicesGiveTheSameLogits) {
  std::mt19937 random(8);
  std::vector<int64_t> tokens(300);
  for (int64_t& id : tokens) id = static_cast<int64_t>(random() % 256);
  const Pass cpu = pass(at::kCPU, tokens, {});
  std::vector<model::BlockChoices> forced = cpu.choices;
  for (model::BlockChoices& block : forced) {
    if (block.experts.defined()) block.experts = block.experts.to(at::kCUDA);
    if (block.selection.defined()) block.selection = block.selection.to(at::kCUDA);
  }
  const Pass gpu = pass(at::kCUDA, tokens, forced);
  for (size_t block = 0; block < forced.size(); ++block)
    EXPECT_TRUE(at::equal(gpu.choices[block].experts.cpu(), cpu.choices[block].experts)) << block;
  const at::Tensor apart =
      (gpu.logits - cpu.logits).pow(2).sum(1).div(cpu.logits.pow(2).sum(1)).sqrt();
  const double mean = apart.mean().item<double>(), most = apart.max().item<double>();
  std::printf("%s: apart %.4f in the mean of %d rows, %.4f at most\n",
              ops::numerics_name(GetParam().numerics), mean, static_cast<int>(apart.size(0)), most);
  EXPECT_LE(mean, GetParam().tolerance);
  EXPECT_LE(most, 2 * GetParam().tolerance);
}

std::string name_of(const ::testing::TestParamInfo<Case>& test) {
  return concat(ops::numerics_name(test.param.numerics), test.param.packed ? "Packed" : "",
                test.param.wide ? "Wide" : "");
}

// A model with random weights in quantised numerics turns another order of sums into other choices
// of experts and blocks: on an H200 0.24, with the products of packed weights 0.50 (the CPU's
// kernels against its references: 0.09 in the mean of 430 rows, 0.58 at most). Unrelated logits are
// 1.4 apart. With choices forced 0.055 in the mean of 300 rows, of packed weights 0.081 (`bf16`
// 0.009). What a kernel computes is held to bits where it is tested by itself.
INSTANTIATE_TEST_SUITE_P(Numerics,
                         EngineOnGpu,
                         ::testing::Values(Case{Numerics::kIdeal, 1e-5},
                                           Case{Numerics::kBf16, 0.03},
                                           Case{Numerics::kReleased, 0.35},
                                           Case{Numerics::kBf16, 0.03, true},
                                           Case{Numerics::kReleased, 0.8, true},
                                           Case{Numerics::kReleased, 0.8, true, true}),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Numerics,
                         ForcedOnGpu,
                         ::testing::Values(Case{Numerics::kBf16, 0.015, true},
                                           Case{Numerics::kReleased, 0.08},
                                           Case{Numerics::kReleased, 0.1, true},
                                           Case{Numerics::kReleased, 0.1, true, true}),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Numerics,
                         RecordedStep,
                         ::testing::Values(Case{Numerics::kBf16, 0},
                                           Case{Numerics::kReleased, 0},
                                           Case{Numerics::kBf16, 0, true},
                                           Case{Numerics::kReleased, 0, true},
                                           Case{Numerics::kReleased, 0, true, true}),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Numerics,
                         KernelsAlone,
                         ::testing::Values(Case{Numerics::kBf16, 0, true},
                                           Case{Numerics::kReleased, 0, true},
                                           Case{Numerics::kReleased, 0, true, true}),
                         name_of);

}  // namespace
}  // namespace hadal::engine
