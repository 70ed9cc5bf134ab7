#include "engine/local_engine.h"

#include <algorithm>
#include <chrono>
#include <future>
#include <numeric>

#include "base/check.h"
#include "base/log.h"
#include "base/math.h"
#include "base/memory.h"
#include "engine/dspark_drafter.h"
#include "engine/memory_plan.h"
#include "engine/mtp_drafter.h"
#include "engine/sampler.h"
#include "engine_core/answer/answer_filters.h"

namespace hadal::engine {
namespace {

/// Everything that must be equal for cached bytes to mean the same.
std::string identity_of(const std::string& digest, const KvCache& cache) {
  return concat("weights ", digest, " numerics ", ops::numerics_name(cache.options().numerics),
                " layout 1 page ", cache.page_tokens(), " bytes ", cache.page_bytes(), " mtp ",
                cache.options().with_mtp ? 1 : 0, " on ", cache.options().device.str());
}

/// Of the cache's: tokens of answers take little beside what is kept of their states.
int64_t cuts_bytes(int64_t cache_bytes) { return cache_bytes / 256; }

/// Compiled grammars are remembered beside the cache, in proportion to it.
engine_core::GrammarLimits grammar_limits(int64_t cache_bytes) {
  constexpr int64_t kLeast = int64_t{2} << 20;
  engine_core::GrammarLimits limits;
  limits.cache_bytes = static_cast<size_t>(
      std::clamp(cache_bytes / 32, kLeast, static_cast<int64_t>(limits.cache_bytes)));
  return limits;
}

/// Of a sequence in a step, at most; 0: none.
int64_t most_drafts(const model::ModelConfig& config, const LocalEngineOptions& options) {
  const int64_t drafter = config.drafter.exists() ? config.drafter.block_size : config.n_mtp_layers;
  return std::min(options.max_drafts, drafter);
}

KvCacheOptions cache_options(const model::ModelConfig& config, const LocalEngineOptions& options) {
  const int64_t drafts = most_drafts(config, options);
  KvCacheOptions sizes{.numerics = options.numerics,
                       .num_pages = 1,
                       .num_slots = 1,
                       .slack = std::max<int64_t>(drafts, 1),
                       .with_mtp = drafts > 0,
                       .whole_windows = !options.disk.folder.empty() &&
                                        options.disk.policy == engine_core::WindowPolicy::kFull};
  if (options.cache_tokens > 0) {
    sizes.num_slots = options.max_running;
    sizes.num_pages = pages_for_context(config, options.cache_tokens, sizes);
  } else {
    plan_cache(config, options.cache_bytes - cuts_bytes(options.cache_bytes), options.max_running,
               sizes);
  }
  sizes.device = options.device;
  sizes.lazy = options.lazy_memory;
  return sizes;
}

int64_t step_tokens(const LocalEngineOptions& options) {
  if (options.step_tokens > 0) return options.step_tokens;
  return options.device.is_cpu() ? 256 : 1024;
}
int64_t prompt_tokens(const LocalEngineOptions& options) {
  if (options.prompt_tokens > 0) return options.prompt_tokens;
  return options.device.is_cpu() ? 1024 : 4096;
}

/// Prompts of growing length while they take little time, and a token behind the last, where nobody
/// has anything yet: afterwards code, weights and buffers that steps need are in memory.
void warm_up(ModelRunner& runner, const KvCache& cache, int64_t most) {
  constexpr std::chrono::milliseconds kLittle{100};
  most = std::min(most, cache.num_pages() * cache.page_tokens() - 1);
  const std::vector<int64_t> tokens(static_cast<size_t>(most) + 1, 0);
  std::vector<int64_t> pages(static_cast<size_t>(ceil_div(most + 1, cache.page_tokens())));
  std::iota(pages.begin(), pages.end(), int64_t{0});
  const auto run = [&](int64_t start, int64_t count) {
    const engine_core::SequenceStep step{
        .slot = 0,
        .start = start,
        .tokens = std::span(tokens).subspan(static_cast<size_t>(start), static_cast<size_t>(count)),
        .pages = pages,
        .num_logits = 1};
    runner.run({&step, 1});
  };
  for (int64_t count = std::min<int64_t>(16, most);; count = std::min(4 * count, most)) {
    const auto begin = std::chrono::steady_clock::now();
    run(0, count);
    run(count, 1);
    if (count == most || std::chrono::steady_clock::now() - begin > kLittle) return;
  }
}

}  // namespace

struct LocalEngine::Parts {
  KvCache cache;
  ModelSampler sampler;
  ModelRunner runner;
  engine_core::TextFilters filters;
  std::unique_ptr<engine_core::Drafter> drafter;
  std::unique_ptr<engine_core::DiskStore> disk;
  engine_core::AnswerCuts cuts;
  model::ModelConfig config;
  std::shared_ptr<const model::Transformer> updated;  // null: still the first model
  std::unique_ptr<engine_core::ServingLoop> loop;     // last: its thread uses the others

  Parts(const model::Transformer& model,
        const text::Tokenizer& tokenizer,
        const LocalEngineOptions& options)
      : cache(model.config(), cache_options(model.config(), options)),
        sampler(tokenizer.vocab_size()),
        runner(model, cache, sampler),
        filters(tokenizer, grammar_limits(options.cache_bytes)),
        cuts(tokenizer, cuts_bytes(options.cache_bytes)),
        config(model.config()) {}
};

LocalEngine::LocalEngine(const model::Transformer& model,
                         const text::Tokenizer& tokenizer,
                         const std::string& weights_digest,
                         const LocalEngineOptions& options)
    : parts_(std::make_unique<Parts>(model, tokenizer, options)) {
  const model::ModelConfig& config = model.config();
  KvCache& cache = parts_->cache;
  const bool in_blocks = parts_->runner.block_size() > 0;
  if (in_blocks) {
    parts_->drafter =
        std::make_unique<DsparkDrafter>(parts_->runner, parts_->sampler, options.draft_threshold);
  } else if (parts_->runner.drafts()) {
    parts_->drafter = std::make_unique<MtpDrafter>(parts_->runner, parts_->sampler);
  }
  if (!options.disk.folder.empty()) {
    engine_core::DiskStoreOptions disk = options.disk;
    disk.identity = identity_of(weights_digest, cache);
    disk.page_tokens = cache.page_tokens();
    disk.window_pages = cache.window_pages();
    parts_->disk = std::make_unique<engine_core::DiskStore>(disk);
  }
  if (options.warm_up) {
    touch_weights(model);
    // In a thread of its own: the loop's, which comes next, inherits what glibc gave it to allocate
    // in.
    std::async(std::launch::async, [&] {
      warm_up(parts_->runner, cache, prompt_tokens(options));
    }).get();
    tokenizer.take_caches();
    give_back_freed_memory();
  }
  const int64_t weights = options.device.is_cpu() ? weights_bytes(model) : 0;
  int64_t context =
      std::min(config.max_position_embeddings, (cache.num_pages() - 1) * cache.page_tokens());
  if (options.max_context > 0) context = std::min(context, options.max_context);
  const engine_core::EngineInfo info{.model_name = options.model_name,
                                     .vocab_size = tokenizer.vocab_size(),
                                     .max_context = context,
                                     .max_choices = options.max_running,
                                     .eos_token = config.eos_token_id,
                                     .weights_bytes = weights,
                                     .weights = weights_digest};
  engine_core::SchedulerOptions scheduling;
  scheduling.max_running = std::min(options.max_running, cache.num_slots());
  scheduling.max_waiting = options.max_waiting;
  scheduling.step_tokens = step_tokens(options);
  scheduling.prompt_tokens = prompt_tokens(options);
  scheduling.prompt_seconds = options.prompt_step_ms / 1e3;
  scheduling.max_drafts = most_drafts(config, options);
  scheduling.drafts_in_blocks = in_blocks;
  scheduling.always_draft = options.always_draft;
  scheduling.cache.snapshot_interval = options.snapshot_interval;
  if (options.device.is_cuda() && options.numerics == ops::Numerics::kIdeal) {
    log::warn("engine", "`ideal` runs references on ", options.device.str(),
              ", slowly, and the bits of an answer may depend on the load");
  }
  log::info("engine", capacity(), ", context of at most ", context, " tokens");
  if (scheduling.max_running < options.max_running && options.cache_tokens == 0)
    log::info("engine", "at most ", scheduling.max_running, " sequences run at once, not ",
              options.max_running, ": more state slots would leave too little of the cache");
  parts_->loop = std::make_unique<engine_core::ServingLoop>(
      info, scheduling,
      engine_core::SchedulerParts{.runner = parts_->runner,
                                  .memory = cache,
                                  .filters = parts_->filters,
                                  .drafter = parts_->drafter.get(),
                                  .store = parts_->disk.get(),
                                  .cuts = &parts_->cuts});
}

LocalEngine::~LocalEngine() = default;

void LocalEngine::update_weights(std::shared_ptr<const model::Transformer> model,
                                 const engine_core::WeightsVersion& version) {
  HADAL_INPUT_CHECK(model != nullptr && model->config() == parts_->config,
                    "weights: of another configuration than the engine's");
  HADAL_INPUT_CHECK(parts_->disk == nullptr || !version.digest.empty(),
                    "weights: without a digest what is stored on disk cannot be told apart");
  const auto swap = [&] {
    // What can fail comes first: then everything is as before.
    if (parts_->disk != nullptr)
      parts_->disk->set_identity(identity_of(version.digest, parts_->cache));
    parts_->runner.set_model(*model);
    parts_->updated = std::move(model);
  };
  parts_->loop->update_weights({.version = version, .swap = swap});
}

engine_core::Engine& LocalEngine::engine() { return *parts_->loop; }
engine_core::ServingLoop& LocalEngine::loop() { return *parts_->loop; }
const KvCache& LocalEngine::cache() const { return parts_->cache; }

std::string LocalEngine::capacity() const {
  const KvCache& cache = parts_->cache;
  constexpr int64_t kTokens = 5000;  // of a conversation, for an example
  const int64_t pages = ceil_div(kTokens, cache.page_tokens()),
                state = ceil_div(cache.snapshot_bytes(kTokens), cache.page_bytes());
  return concat(cache.num_slots(), " slots of ", cache.state_bytes(), " bytes, ", cache.num_pages(),
                " pages of ", cache.page_tokens(), " tokens and ", cache.page_bytes(),
                " bytes for rows and states: ", cache.num_pages() / (pages + state),
                " conversations of ", kTokens, " tokens fit, or ",
                cache.num_pages() * cache.page_tokens(), " tokens");
}

const engine_core::DiskStore* LocalEngine::disk() const { return parts_->disk.get(); }
engine_core::TextStore* LocalEngine::texts() { return parts_->disk.get(); }

void LocalEngine::state_workspace() {
  const engine_core::EngineStats stats = parts_->loop->stats();
  const bool on_cpu = parts_->cache.options().device.is_cpu();
  const int64_t beside = on_cpu ? stats.weights_bytes + stats.cache_bytes : 0;
  parts_->loop->state_workspace(std::max<int64_t>(resident_bytes() - beside, 0));
}

}  // namespace hadal::engine
