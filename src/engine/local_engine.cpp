#include "engine/local_engine.h"

#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "base/math.h"
#include "engine/mtp_drafter.h"
#include "engine/sampler.h"
#include "engine_core/answer_filters.h"

namespace hadal::engine {
namespace {

/// Everything that must be equal for cached bytes to mean the same.
std::string identity_of(const std::string& digest, const KvCache& cache) {
  return concat("weights ", digest, " numerics ", ops::numerics_name(cache.options().numerics),
                " layout 1 page ", cache.page_tokens(), " bytes ", cache.page_bytes(), " mtp ",
                cache.options().with_mtp ? 1 : 0, " on ", cache.options().device.str());
}

KvCacheOptions cache_options(const model::ModelConfig& config, const LocalEngineOptions& options) {
  const bool drafts = options.max_drafts > 0 && config.n_mtp_layers > 0;
  KvCacheOptions sizes{
      .numerics = options.numerics,
      .num_pages = 1,
      .num_slots = 1,
      .slack = std::max<int64_t>(options.max_drafts, 1),
      .with_mtp = drafts,
      .whole_windows = !options.disk.folder.empty() && options.disk.policy == WindowPolicy::kFull};
  const KvCache one(config, sizes);
  sizes.device = options.device;
  sizes.lazy = options.lazy_memory;
  sizes.num_slots = options.max_running;
  if (options.cache_tokens > 0) {
    // One page more than the tokens have: a shared last page is copied before it is written.
    sizes.num_pages = ceil_div(options.cache_tokens, one.page_tokens()) + 1;
    return sizes;
  }
  const int64_t left = options.cache_bytes - sizes.num_slots * one.state_bytes();
  sizes.num_pages = one.page_bytes() > 0 ? left / one.page_bytes() : 1;
  HADAL_INPUT_CHECK(sizes.num_pages >= 2, "engine: a cache of ", options.cache_bytes,
                    " bytes holds ", sizes.num_slots, " slots of ", one.state_bytes(),
                    " bytes and not two pages of ", one.page_bytes(),
                    "; give it more or run fewer sequences");
  return sizes;
}

}  // namespace

struct LocalEngine::Parts {
  KvCache cache;
  ModelRunner runner;
  ModelSampler sampler;
  TextFilters filters;
  std::unique_ptr<MtpDrafter> drafter;
  std::unique_ptr<DiskStore> disk;
  std::unique_ptr<ServingLoop> loop;  // last: its thread uses the others

  Parts(const model::Transformer& model,
        const text::Tokenizer& tokenizer,
        const LocalEngineOptions& options)
      : cache(model.config(), cache_options(model.config(), options)),
        runner(model, cache),
        sampler(tokenizer.vocab_size()),
        filters(tokenizer) {}
};

LocalEngine::LocalEngine(const model::Transformer& model,
                         const text::Tokenizer& tokenizer,
                         const std::string& weights_digest,
                         const LocalEngineOptions& options)
    : parts_(std::make_unique<Parts>(model, tokenizer, options)) {
  const model::ModelConfig& config = model.config();
  KvCache& cache = parts_->cache;
  if (parts_->runner.drafts())
    parts_->drafter = std::make_unique<MtpDrafter>(parts_->runner, parts_->sampler);
  if (!options.disk.folder.empty()) {
    DiskStoreOptions disk = options.disk;
    disk.identity = identity_of(weights_digest, cache);
    disk.page_tokens = cache.page_tokens();
    disk.window_pages = cache.window_pages();
    parts_->disk = std::make_unique<DiskStore>(disk);
  }
  int64_t context =
      std::min(config.max_position_embeddings, (cache.num_pages() - 1) * cache.page_tokens());
  if (options.max_context > 0) context = std::min(context, options.max_context);
  const EngineInfo info{.model_name = options.model_name,
                        .vocab_size = tokenizer.vocab_size(),
                        .max_context = context,
                        .max_choices = options.max_running,
                        .eos_token = config.eos_token_id};
  SchedulerOptions scheduling;
  scheduling.max_running = options.max_running;
  scheduling.max_waiting = options.max_waiting;
  scheduling.step_tokens = options.step_tokens;
  scheduling.prompt_tokens = options.prompt_tokens;
  // The MTP block looks one token ahead.
  scheduling.max_drafts = parts_->drafter ? std::min<int64_t>(options.max_drafts, 1) : 0;
  scheduling.always_draft = options.always_draft;
  scheduling.cache.snapshot_interval = options.snapshot_interval;
  scheduling.cache.snapshot_budget_bytes = options.snapshot_bytes;
  if (options.device.is_cuda()) {
    log::warn("engine", "products and attention run LibTorch's kernels on ", options.device.str(),
              ", which are not batch-invariant: the bits of an answer may depend on the load");
  }
  log::info("engine", cache.num_pages(), " pages of ", cache.page_tokens(), " tokens and ",
            cache.page_bytes(), " bytes, ", cache.num_slots(), " slots of ", cache.state_bytes(),
            " bytes, context of at most ", context, " tokens");
  parts_->loop = std::make_unique<ServingLoop>(info, scheduling,
                                               SchedulerParts{.runner = parts_->runner,
                                                              .memory = cache,
                                                              .sampler = parts_->sampler,
                                                              .filters = parts_->filters,
                                                              .drafter = parts_->drafter.get(),
                                                              .store = parts_->disk.get()});
}

LocalEngine::~LocalEngine() = default;
Engine& LocalEngine::engine() { return *parts_->loop; }
ServingLoop& LocalEngine::loop() { return *parts_->loop; }
const KvCache& LocalEngine::cache() const { return parts_->cache; }
const DiskStore* LocalEngine::disk() const { return parts_->disk.get(); }

}  // namespace hadal::engine
