#include "apps/bench_model.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <random>
#include <span>
#include <utility>

#include <ATen/ATen.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "apps/model_folder.h"
#include "base/check.h"
#include "base/file.h"
#include "base/log.h"
#include "base/math.h"
#include "base/progress.h"
#include "engine/kv_cache.h"
#include "engine/memory_plan.h"
#include "engine/model_runner.h"
#include "engine/sampler.h"
#include "model/cost.h"
#include "model/presets.h"
#include "model/random_weights.h"
#include "ops/device_memory.h"
#include "text/tokenizer.h"

namespace hadal::apps {
namespace {

using Clock = std::chrono::steady_clock;
using engine_core::SequenceStep;

constexpr double kBytesPerGiB = 1024.0 * 1024.0 * 1024.0;
constexpr int64_t kPrefillTokens = 4096, kComputedContext = 8192;

double microseconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::micro>(to - from).count();
}

double middle(std::vector<double> values) {
  std::ranges::nth_element(values, values.begin() + std::ssize(values) / 2);
  return values[values.size() / 2];
}

/// The first layers of a released model.
model::ModelConfig first_layers(const std::string& preset, int64_t layers) {
  HADAL_INPUT_CHECK(preset == "v4-flash" || preset == "v4-pro",
                    "bench: expected --preset v4-flash or v4-pro, found ", preset);
  model::ModelConfig config =
      preset == "v4-flash" ? model::deepseek_v4_flash() : model::deepseek_v4_pro();
  HADAL_INPUT_CHECK(layers <= config.n_layers, "bench: ", layers, " layers, ", preset, " has ",
                    config.n_layers);
  config.compress_ratios.resize(static_cast<size_t>(layers));
  config.n_layers = layers;
  config.n_hash_layers = std::min(config.n_hash_layers, layers);
  config.n_mtp_layers = 0;
  return config;
}

/// Bytes of the packed weights.
int64_t packed_bytes(const model::ModelConfig& config) {
  double bytes = 0;
  const model::Transformer model(config);
  model.visit([&](const model::Parameter& p) {
    double each = 2;
    if (p.storage == model::Storage::kFp4) each = 17.0 / 32.0;
    if (p.storage == model::Storage::kFp8) each = 1.0 + 4.0 / (128 * 128);
    if (p.storage == model::Storage::kF32) each = 4;
    if (p.kind == model::ParamKind::kHashTable) each = 8;
    bytes += each * static_cast<double>(c10::multiply_integers(p.shape));
  });
  return static_cast<int64_t>(bytes);
}

/// Sequences of one context with their pages, all with the state behind `context` tokens.
class Case {
 public:
  Case(const model::Transformer& model, int64_t sequences, int64_t context, int64_t room)
      : model_(model),
        sampler_(model.config().vocab_size),
        context_(context),
        cache_(model.config(), sizes(model.config(), sequences, context + room)),
        runner_(model, cache_, sampler_) {
    const int64_t pages = cache_.num_pages() / sequences;
    for (int64_t s = 0; s < sequences; ++s) {
      auto& table = pages_.emplace_back();
      // Neighbours of a sequence lie apart, as after a while of serving.
      for (int64_t page = 0; page < pages; ++page) table.push_back(page * sequences + s);
    }
  }

  int64_t cache_bytes() const { return cache_.allocated_bytes(); }

  /// The first tokens are computed, the pages behind them copied, and so is every other sequence.
  void fill(bool whole) {
    const int64_t page_tokens = cache_.page_tokens();
    const int64_t computed = whole ? context_ : std::min(context_, kComputedContext);
    Progress progress("prefill", computed, "tokens");
    for (int64_t at = 0; at < computed; at += kPrefillTokens) {
      const int64_t count = std::min(kPrefillTokens, computed - at);
      run({{0, at, count, 0}});
      progress.update(at + count);
    }
    progress.finish();
    const int64_t have = computed / page_tokens, wanted = ceil_div(context_, page_tokens);
    for (int64_t page = have; have > 0 && page < wanted; ++page)
      cache_.copy_page(pages_[0][static_cast<size_t>(page % have)],
                       pages_[0][static_cast<size_t>(page)]);
    std::vector<std::byte> state(static_cast<size_t>(cache_.snapshot_bytes(context_)));
    cache_.save_snapshot(0, context_, state);
    for (size_t s = 1; s < pages_.size(); ++s) {
      for (int64_t page = 0; page < wanted; ++page)
        cache_.copy_page(pages_[0][static_cast<size_t>(page)],
                         pages_[s][static_cast<size_t>(page)]);
      cache_.load_snapshot(static_cast<int64_t>(s), context_, state);
    }
  }

  struct Times {
    double step_us = 0, host_us = 0;
  };

  /// The whole context in chunks, then an answer. `text`: tokens that the context begins with.
  LongRun go(const std::vector<int64_t>& text, int64_t answer) {
    text_ = text;
    LongRun result{.context = context_, .answer = answer};
    std::vector<double> chunks;
    Progress progress("prefill", context_, "tokens");
    const auto begin = Clock::now();
    for (int64_t at = 0; at < context_; at += kPrefillTokens) {
      const int64_t count = std::min(kPrefillTokens, context_ - at);
      const double us = run({{0, at, count, at + count == context_ ? 1 : 0}}, true).step_us;
      if (count == kPrefillTokens) chunks.push_back(us / 1e3);
      progress.update(at + count);
    }
    result.prefill_seconds = microseconds(begin, Clock::now()) / 1e6;
    progress.finish();
    if (!chunks.empty()) {
      result.first_chunk_ms = chunks[chunks.size() > 1 ? 1 : 0];  // the very first warms up
      result.last_chunk_ms = chunks.back();
    }
    std::vector<double> steps;
    for (int64_t i = 0; i < answer; ++i) {
      text_ = {drawn_};
      text_at_ = context_ + i;
      steps.push_back(run({{0, context_ + i, 1, 1}}).step_us / 1e3);
    }
    const auto tenth = std::max<std::ptrdiff_t>(1, std::ssize(steps) / 10);
    result.decode_ms = middle(steps);
    result.early_ms = middle({steps.begin(), steps.begin() + tenth});
    result.late_ms = middle({steps.end() - tenth, steps.end()});
    result.cache_bytes = static_cast<double>(cache_.allocated_bytes());
    const model::Cost cost = model::decode_cost(model_.config(), context_ + answer);
    result.formula_bytes = cost.kv_bytes_per_token * static_cast<double>(context_ + answer) +
                           cost.window_bytes + cost.state_bytes;
    return result;
  }
  /// Steps of so many tokens in every sequence, each behind the last unless `in_place`.
  Times time(int64_t tokens, int64_t logits, int64_t steps, bool in_place) {
    std::vector<double> whole, host;
    int64_t at = context_;
    for (int64_t i = -4; i < steps; ++i) {  // some to warm up, and a graph to be recorded
      std::vector<Run> runs;
      for (int64_t s = 0; s < std::ssize(pages_); ++s) runs.push_back({s, at, tokens, logits});
      // Every fourth step waits for the device before it collects, to see what the host does alone.
      const bool apart = i % 4 == 3;
      const Times t = run(runs, apart);
      if (i >= 0) (apart ? host : whole).push_back(apart ? t.host_us : t.step_us);
      if (!in_place) at += tokens;
    }
    return {.step_us = middle(whole), .host_us = host.empty() ? 0 : middle(host)};
  }

 private:
  struct Run {
    int64_t slot, start, count, logits;
  };

  static engine::KvCacheOptions sizes(const model::ModelConfig& config,
                                      int64_t sequences,
                                      int64_t tokens) {
    return {.numerics = ops::Numerics::kReleased,
            .num_pages = sequences * ceil_div(tokens, engine::page_tokens_of(config)),
            .num_slots = sequences,
            .slack = 8,
            .device = at::kCUDA};
  }

  Times run(const std::vector<Run>& runs, bool apart = false) {
    std::vector<SequenceStep> steps;
    std::vector<std::vector<int64_t>> ids;
    std::vector<std::vector<engine_core::Draw>> draws;
    ids.reserve(runs.size());
    draws.reserve(runs.size());
    for (const Run& r : runs) {
      auto& tokens = ids.emplace_back();
      for (int64_t i = r.start; i < r.start + r.count; ++i) tokens.push_back(token(i));
      auto& drawn = draws.emplace_back();
      for (int64_t row = 0; row < r.logits; ++row) {
        drawn.emplace_back();
        drawn.back().row = row;
        drawn.back().sampling = &sampling_;
        drawn.back().pos = r.start + r.count - r.logits + row + 1;
      }
      const auto& table = pages_[static_cast<size_t>(r.slot)];
      steps.push_back({.slot = r.slot,
                       .start = r.start,
                       .tokens = tokens,
                       .pages = std::span(table).first(
                           static_cast<size_t>(ceil_div(r.start + r.count, cache_.page_tokens()))),
                       .num_logits = r.logits,
                       .draws = drawn});
    }
    const auto begin = Clock::now();
    const auto ticket = runner_.launch(steps);
    const auto launched = Clock::now();
    auto synced = launched;
    if (apart) {
      c10::impl::VirtualGuardImpl(at::kCUDA).synchronizeDevice(0);
      synced = Clock::now();
    }
    const engine_core::StepResult result = runner_.collect(ticket);
    if (runs.back().logits > 0) drawn_ = result.sequences.back().drawn.back().token;
    const auto end = Clock::now();
    return {.step_us = microseconds(begin, end),
            .host_us = microseconds(begin, launched) + microseconds(synced, end)};
  }

  /// The text's where there is one, else a random one.
  int64_t token(int64_t at) {
    if (at >= text_at_ && at - text_at_ < std::ssize(text_))
      return text_[static_cast<size_t>(at - text_at_)];
    return static_cast<int64_t>(random_() % static_cast<uint64_t>(model_.config().vocab_size));
  }

  const model::Transformer& model_;
  engine::ModelSampler sampler_;
  Sampling sampling_{.temperature = 1.0, .seed = 7};
  int64_t context_;
  engine::KvCache cache_;
  engine::ModelRunner runner_;
  std::vector<std::vector<int64_t>> pages_;  // of each sequence
  std::mt19937_64 random_{5};
  std::vector<int64_t> text_;  // from position text_at_ on
  int64_t text_at_ = 0, drawn_ = 0;
};

/// Runs `work`; false where the device's memory does not hold it.
template <typename Work>
bool fits(const std::string& what, const Work& work) {
  try {
    work();
    return true;
  } catch (const c10::OutOfMemoryError&) {
    log::warn("bench", what, ": does not fit into the device's memory");
    return false;
  }
}

}  // namespace

ModelBench bench_model(const ModelBenchOptions& options) {
  HADAL_INPUT_CHECK(at::globalContext().hasCUDA(), "bench: model needs a GPU, found none");
  const int64_t free = ops::device_memory(at::kCUDA).free;
  constexpr int64_t kReserve = int64_t{12} << 30;  // caches and what a step needs
  ModelBench result;
  result.layers = options.layers;
  if (result.layers == 0) {
    const int64_t most = options.preset == "v4-pro" ? model::deepseek_v4_pro().n_layers
                                                    : model::deepseek_v4_flash().n_layers;
    for (result.layers = most; result.layers > 1; --result.layers)
      if (packed_bytes(first_layers(options.preset, result.layers)) + kReserve <= free) break;
  }
  model::Transformer model(first_layers(options.preset, result.layers));
  log::info("bench", "random weights of ", result.layers, " layers");
  model::fill_random_packed(model, at::kCUDA, 1);
  result.weights_gib = static_cast<double>(engine::weights_bytes(model)) / kBytesPerGiB;
  const auto add = [&](std::string what, int64_t tokens, const Case::Times& t) {
    result.lines.push_back({.what = std::move(what),
                            .tokens = tokens,
                            .milliseconds = t.step_us / 1e3,
                            .layer_us = t.step_us / static_cast<double>(result.layers),
                            .host_us = t.host_us});
  };
  if (options.answer > 0) {
    std::vector<int64_t> text;
    if (!options.text.empty()) {
      const auto tokenizer = text::Tokenizer::from_file(model_folder("") + "/tokenizer.json");
      for (const int64_t id :
           tokenizer.encode(read_file(options.text), text::SpecialTokens::kAsText))
        text.push_back(id);
    }
    for (const int64_t context : options.contexts) {
      fits(concat("a context of ", context), [&] {
        Case c(model, 1, context, options.answer);
        result.kv_gib = static_cast<double>(c.cache_bytes()) / kBytesPerGiB;
        result.long_runs.push_back(c.go(text, options.answer));
      });
    }
    return result;
  }
  for (const int64_t context : options.contexts) {
    for (const int64_t batch : options.batches) {
      const std::string name = concat("decode, ", batch, " x ", context);
      fits(name, [&] {
        std::vector<int64_t> lengths = {1};
        for (const int64_t drafts : options.drafts) lengths.push_back(1 + drafts);
        const int64_t longest = std::ranges::max(lengths);
        Case c(model, batch, context, (options.steps + 4) * longest);
        c.fill(options.whole_prefill);
        result.kv_gib =
            std::max(result.kv_gib, static_cast<double>(c.cache_bytes()) / kBytesPerGiB);
        for (const int64_t length : lengths)
          add(length == 1 ? name : concat(name, ", ", length, " tokens each"), batch * length,
              c.time(length, length, options.steps, false));
      });
    }
    for (const int64_t chunk : options.chunks) {
      const std::string name = concat("prefill of ", chunk, " behind ", context);
      fits(name, [&] {
        Case c(model, 1, context, chunk);
        c.fill(options.whole_prefill);
        add(name, chunk, c.time(chunk, 1, std::max<int64_t>(options.steps / 5, 3), true));
      });
    }
  }
  return result;
}

}  // namespace hadal::apps
