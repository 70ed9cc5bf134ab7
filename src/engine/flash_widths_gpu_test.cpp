// Layers of V4-Flash's widths on a GPU: a token's streams after each layer, whatever the pieces its
// text came in.
#include <algorithm>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <gtest/gtest.h>

#include "base/math.h"
#include "engine/kv_cache.h"
#include "engine_core/runner.h"
#include "model/presets.h"
#include "model/random_weights.h"
#include "model/transformer.h"

namespace hadal::engine {
namespace {

class FlashWidths : public ::testing::Test {
 protected:
  static constexpr int64_t kSlots = 4;
  void SetUp() override {
    if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "no CUDA device";
    model::ModelConfig config = model::deepseek_v4_flash();
    config.n_layers = 4;
    config.compress_ratios = {0, 0, 4, 128, 0};
    at::manual_seed(3);
    model_.emplace(config);
    model::fill_random_packed(*model_, at::kCUDA, 5);
    std::mt19937_64 random(7);
    for (int64_t i = 0; i < kTokens; ++i)
      tokens_.push_back(static_cast<int64_t>(random() % static_cast<uint64_t>(config.vocab_size)));
  }
  static constexpr int64_t kTokens = 6000;

  /// [layers][tokens, streams] on the host, of tokens computed in such pieces.
  std::vector<at::Tensor> run(KvCache& cache, int64_t slot, const std::vector<int64_t>& pieces) {
    const c10::InferenceMode inference;
    const int64_t each = ceil_div(kTokens, cache.page_tokens());
    std::vector<int64_t> pages;
    for (int64_t i = 0; i < each; ++i) pages.push_back(i * kSlots + slot);
    const int64_t layers = model_->config().n_layers;
    std::vector<std::vector<at::Tensor>> parts(static_cast<size_t>(layers));
    int64_t at_token = 0;
    for (const int64_t piece : pieces) {
      const auto part =
          std::span(tokens_).subspan(static_cast<size_t>(at_token), static_cast<size_t>(piece));
      const engine_core::SequenceStep step{
          .slot = slot, .start = at_token, .tokens = part, .pages = pages};
      const ops::Batch batch = cache.begin({&step, 1});
      model::ForwardContext context;
      context.batch = &batch;
      context.numerics = ops::Numerics::kReleased;
      context.kv = &cache;
      at::Tensor streams = model_->embed(batch.ids(), context.numerics);
      for (int64_t layer = 0; layer < layers; ++layer) {
        streams = model_->run_layer(layer, streams, batch.ids(), context).streams;
        parts[static_cast<size_t>(layer)].push_back(streams.flatten(1).cpu());
      }
      at_token += piece;
    }
    std::vector<at::Tensor> all;
    for (const auto& of_layer : parts) all.push_back(at::cat(of_layer));
    return all;
  }
  static void expect_same(const std::vector<at::Tensor>& found,
                          const std::vector<at::Tensor>& wanted,
                          const std::string& what) {
    for (size_t layer = 0; layer < found.size(); ++layer) {
      const at::Tensor rows =
          (found[layer].view(at::kShort) != wanted[layer].view(at::kShort)).any(1).nonzero();
      EXPECT_EQ(rows.numel(), 0) << what << ": layer " << layer << " differs in " << rows.numel()
                                 << " rows, the first " << rows[0].item<int64_t>();
      if (rows.numel() > 0) return;
    }
  }
  std::optional<model::Transformer> model_;
  std::vector<int64_t> tokens_;
};

TEST_F(FlashWidths, StreamsDoNotDependOnPieces) {
  const model::ModelConfig& config = model_->config();
  KvCache cache(config, {.num_pages = kSlots * 64, .num_slots = kSlots, .device = at::kCUDA});
  const auto pieces_of = [](int64_t each) {
    std::vector<int64_t> pieces;
    for (int64_t left = kTokens; left > 0; left -= each) pieces.push_back(std::min(left, each));
    return pieces;
  };
  const auto wanted = run(cache, 0, pieces_of(4096));
  expect_same(run(cache, 0, pieces_of(4096)), wanted, "the same again");
  expect_same(run(cache, 1, pieces_of(4096)), wanted, "another slot");
  for (const int64_t each : {6000, 3000, 1000, 257, 256, 64})
    expect_same(run(cache, 2, pieces_of(each)), wanted, "pieces of " + std::to_string(each));
  for (const int64_t each : {100, 65, 33, 17, 16, 9, 8, 7, 2, 1}) {
    std::vector<int64_t> pieces = {4096, 1804};
    for (int64_t left = 100; left > 0; left -= each) pieces.push_back(std::min(left, each));
    expect_same(run(cache, 3, pieces), wanted, "last pieces of " + std::to_string(each));
  }
}

// Sequences of one text at different places of it, in steps of random parts of each.
TEST_F(FlashWidths, StreamsDoNotDependOnCompany) {
  const c10::InferenceMode inference;
  const model::ModelConfig& config = model_->config();
  KvCache cache(config, {.num_pages = kSlots * 64, .num_slots = kSlots, .device = at::kCUDA});
  const auto wanted = run(cache, 0, {4096, kTokens - 4096});
  const int64_t each = ceil_div(kTokens, cache.page_tokens());
  std::vector<std::vector<int64_t>> pages(kSlots);
  for (int64_t slot = 0; slot < kSlots; ++slot)
    for (int64_t i = 0; i < each; ++i)
      pages[static_cast<size_t>(slot)].push_back(i * kSlots + (slot + i) % kSlots);
  std::mt19937_64 random(11);
  std::vector<int64_t> at_token(kSlots, 0);
  constexpr int64_t kParts[] = {0, 1, 1, 1, 2, 5, 17, 64, 300, 1000, 2500};
  for (int step_number = 0; step_number < 150; ++step_number) {
    std::vector<engine_core::SequenceStep> steps;
    for (int64_t slot = 0; slot < kSlots; ++slot) {
      int64_t& place = at_token[static_cast<size_t>(slot)];
      const int64_t count = std::min(kParts[random() % std::size(kParts)], kTokens - place);
      if (count == 0) continue;
      steps.push_back({.slot = slot,
                       .start = place,
                       .tokens = std::span(tokens_).subspan(static_cast<size_t>(place),
                                                            static_cast<size_t>(count)),
                       .pages = pages[static_cast<size_t>(slot)]});
      place += count;
    }
    if (steps.empty()) continue;
    const ops::Batch batch = cache.begin(steps);
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = ops::Numerics::kReleased;
    context.kv = &cache;
    at::Tensor streams = model_->embed(batch.ids(), context.numerics);
    for (int64_t layer = 0; layer < config.n_layers; ++layer) {
      streams = model_->run_layer(layer, streams, batch.ids(), context).streams;
      const at::Tensor rows = streams.flatten(1).cpu();
      int64_t row = 0;
      for (const auto& part : steps) {
        const auto count = static_cast<int64_t>(part.tokens.size());
        const at::Tensor own = wanted[static_cast<size_t>(layer)].narrow(0, part.start, count);
        const at::Tensor bad =
            (rows.narrow(0, row, count).view(at::kShort) != own.view(at::kShort)).any(1).nonzero();
        std::string company;
        for (const auto& other : steps)
          company += " " + std::to_string(other.start) + "+" + std::to_string(other.tokens.size());
        ASSERT_EQ(bad.numel(), 0) << "step " << step_number << " layer " << layer << " slot "
                                  << part.slot << " first bad " << bad[0].item<int64_t>() << " of"
                                  << company;
        row += count;
      }
    }
  }
}

}  // namespace
}  // namespace hadal::engine
