// The engine on this machine: a model, its caches, sampler, drafter and stores, and the loop that
// serves them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "engine/kv_cache.h"
#include "engine/model_runner.h"
#include "engine_core/disk/disk_store.h"
#include "engine_core/schedule/serving_loop.h"
#include "model/transformer.h"
#include "text/tokenizer.h"

namespace hadal::engine {

struct LocalEngineOptions {
  ops::Numerics numerics = ops::Numerics::kReleased;
  std::string model_name;
  int64_t max_running = 64;    ///< sequences in a step, at most: their slots are part of the cache
  int64_t max_waiting = 1024;  ///< requests that wait
  /// All that is remembered of texts: slots, pages of rows, kept states, books (memory_plan.h).
  int64_t cache_bytes = int64_t{512} << 20;
  int64_t cache_tokens = 0;       ///< > 0: pages for so many instead, and for some states
  int64_t snapshot_interval = 0;  ///< tokens; 0: the page
  int64_t max_context = 0;        ///< 0: what model and pages allow
  /// Rows of a step while answers are running, at most; 0: 256, on a GPU 1,024.
  int64_t step_tokens = 0;
  double prompt_step_ms = 20;  ///< that a step with prompts and answers may take, or four times the
                               ///< usual
  int64_t prompt_tokens = 0;   ///< rows of a step of prompts alone; 0: 1,024, on a GPU 4,096
  int64_t max_drafts = 0;      ///< 0: no speculation; the MTP block gives 1, DSpark a block
  /// Of DSpark: a block's drafts end before the first that is accepted with less probability, as
  /// the drafter says (DsparkDrafter).
  double draft_threshold = 0.3;
  bool always_draft = false;     ///< also where it does not pay: to measure
  at::Device device = at::kCPU;  ///< where the model's parameters are
  bool lazy_memory = false;      ///< as KvCacheOptions::lazy
  /// A few tokens are run at the start, so that what steps need is in memory and can be stated.
  bool warm_up = false;
  /// Empty folder: no store on disk. Its identity, page and window are filled in.
  engine_core::DiskStoreOptions disk;
};

class LocalEngine {
 public:
  /// `model` and `tokenizer` must outlive it, `model` unless it is updated. `weights_digest` names
  /// the weights on disk. Errors: InputError when the memory does not hold a sequence of one page.
  LocalEngine(const model::Transformer& model,
              const text::Tokenizer& tokenizer,
              const std::string& weights_digest,
              const LocalEngineOptions& options);
  ~LocalEngine();
  LocalEngine(const LocalEngine&) = delete;
  LocalEngine& operator=(const LocalEngine&) = delete;

  /// Other weights, loaded as the first ones were: Engine::update_weights() with them, after which
  /// the engine holds `model` and needs the one before no longer. The digest as in the constructor.
  /// Errors: InputError for another configuration, a version that is not above the last, or, with a
  /// store on disk, no digest.
  void update_weights(std::shared_ptr<const model::Transformer> model,
                      const engine_core::WeightsVersion& version);

  engine_core::Engine& engine();
  engine_core::ServingLoop& loop();
  const KvCache& cache() const;
  /// What fits into the cache, in words.
  std::string capacity() const;
  /// Null without one.
  const engine_core::DiskStore* disk() const;
  /// Where that store keeps texts; null without one.
  engine_core::TextStore* texts();
  /// What the process takes now beside weights and cache is what the engine's stats state from here
  /// on: at the end of a start.
  void state_workspace();

 private:
  struct Parts;
  std::unique_ptr<Parts> parts_;
};

}  // namespace hadal::engine
