#include "apps/bench_step.h"

#include <algorithm>
#include <chrono>
#include <functional>
#include <span>
#include <utility>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"
#include "engine/kv_cache.h"
#include "engine/sampler.h"
#include "model/presets.h"

namespace hadal::apps {
namespace {

double median_microseconds(double seconds, const std::function<void()>& work) {
  std::vector<double> times;
  for (double total = 0; total < seconds || times.size() < 5; total += times.back() * 1e-6) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    times.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
            .count());
  }
  std::ranges::nth_element(times, times.begin() + std::ssize(times) / 2);
  return times[times.size() / 2];
}

/// Steps of one token each, one after the other, with all that layers ask of the cache.
StepBenchLine planning(const StepBenchOptions& options) {
  model::ModelConfig config = model::deepseek_v4_flash();
  config.head_dim = config.index_head_dim = 8;  // no bytes are looked at
  const int64_t page_tokens = engine::page_tokens_of(config);
  // Room for the tokens that the steps add.
  const int64_t pages = ceil_div(options.context, page_tokens) + 64;
  engine::KvCache cache(config, {.numerics = ops::Numerics::kBf16,
                                 .num_pages = options.sequences * pages,
                                 .num_slots = options.sequences,
                                 .lazy = true});
  std::vector<std::vector<int64_t>> tables(static_cast<size_t>(options.sequences));
  for (size_t s = 0; s < tables.size(); ++s)
    for (int64_t page = 0; page < pages; ++page)
      tables[s].push_back(page * options.sequences + static_cast<int64_t>(s));
  const int64_t token = 0, most = (pages - 1) * page_tokens;
  const at::Tensor nothing = at::empty({0, config.head_dim}, at::kBFloat16);
  int64_t pos = options.context;
  const double time = median_microseconds(options.seconds, [&] {
    std::vector<engine_core::SequenceStep> steps;
    for (size_t s = 0; s < tables.size(); ++s) {
      const auto start = pos + static_cast<int64_t>(s) % page_tokens;
      const int64_t needed = ceil_div(start + 1, page_tokens);
      steps.push_back({.slot = static_cast<int64_t>(s),
                       .start = start,
                       .tokens = {&token, 1},
                       .pages = std::span(tables[s]).first(static_cast<size_t>(needed)),
                       .num_logits = 1});
    }
    pos = pos + 1 < most - page_tokens ? pos + 1 : options.context;
    cache.begin(steps);
    for (int64_t layer = 0; layer < config.n_layers; ++layer) {
      using model::BlockKind;
      using model::RingKind;
      cache.ring(layer, RingKind::kWindow);
      if (config.ratio(layer) == 0) continue;
      cache.ring(layer, RingKind::kKv);
      cache.ring(layer, RingKind::kScore);
      cache.append_blocks(layer, BlockKind::kCompressed, nothing);
      if (config.kind(layer) != model::LayerKind::kCsa) continue;
      cache.ring(layer, RingKind::kIndexKv);
      cache.ring(layer, RingKind::kIndexScore);
      cache.append_blocks(layer, BlockKind::kIndexKeys, nothing);
    }
  });
  return {concat("planning ", options.sequences, " sequences of ", options.context, " tokens"),
          time};
}

StepBenchLine drawing(const StepBenchOptions& options,
                      const at::Tensor& logits,
                      const std::string& how,
                      const Sampling& sampling) {
  engine::ModelSampler sampler(options.vocab);
  std::vector<engine_core::Draw> draws(static_cast<size_t>(options.rows));
  std::vector<engine_core::DrawInput> inputs;
  for (size_t i = 0; i < draws.size(); ++i) {
    draws[i].sampling = &sampling;
    draws[i].choice = static_cast<int64_t>(i);
    inputs.push_back(
        {.draw = draws[i],
         .logits = {logits.const_data_ptr<float>() + static_cast<int64_t>(i) * options.vocab,
                    static_cast<size_t>(options.vocab)}});
  }
  std::vector<engine_core::Sampled> sampled(draws.size());
  const double time = median_microseconds(options.seconds, [&] {
    for (engine_core::Draw& draw : draws) ++draw.pos;
    sampler.sample(inputs, sampled);
  });
  return {concat("drawing from ", options.rows, " rows of ", options.vocab, ", ", how), time};
}

}  // namespace

std::vector<StepBenchLine> bench_step(const StepBenchOptions& options) {
  std::vector<StepBenchLine> lines = {planning(options)};
  const at::Tensor logits = at::randn({options.rows, options.vocab});
  const std::pair<const char*, Sampling> ways[] = {
      {"the likeliest", {.temperature = 0}},
      {"temperature 1", {}},
      {"top-p 0.95", {.top_p = 0.95}},
      {"top-k 50", {.top_k = 50}},
  };
  for (const auto& [how, sampling] : ways) lines.push_back(drawing(options, logits, how, sampling));
  return lines;
}

}  // namespace hadal::apps
