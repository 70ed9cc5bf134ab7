// The shipped model with its engine, as LocalEngine puts it together, but stepped by the caller:
// what tests of whole answers run on.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <ATen/Parallel.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "checkpoint/load_model.h"
#include "engine/model_runner.h"
#include "engine/mtp_drafter.h"
#include "engine/sampler.h"
#include "engine_core/answer/answer_filters.h"
#include "engine_core/schedule/scheduler.h"
#include "text/chat_format.h"
#include "text/tokenizer.h"

namespace hadal::testing {

/// models/hadal-nano, loaded once a process.
struct Nano {
  model::Transformer model;
  text::Tokenizer tokenizer;
  ops::Numerics numerics;

  static const Nano& get() {
    static const Nano nano = [] {
      at::set_num_threads(1);  // hadal's kernels have threads of their own
      const std::string folder = concat(HADAL_SOURCE_DIR, "/models/hadal-nano");
      const auto source = checkpoint::OfficialCheckpoint::open(folder);
      const ops::Numerics numerics = checkpoint::default_numerics(source);
      return Nano{.model = checkpoint::load_model(source, numerics),
                  .tokenizer = text::Tokenizer::from_file(concat(folder, "/tokenizer.json")),
                  .numerics = numerics};
    }();
    return nano;
  }
};

/// One answer as it arrives.
struct NanoAnswer final : engine_core::Sink {
  void on_update(engine_core::Update update) override {
    for (const engine_core::OutputToken& token : update.tokens) {
      tokens.push_back(token.token);
      text += token.text;
    }
    cache = update.cache;
    drafted = update.drafted;
    accepted = update.accepted_drafts;
    error += update.error;
    if (update.finish) finish = update.finish;
  }
  bool stopped() const { return finish == engine_core::FinishReason::kStop; }

  std::vector<int64_t> tokens;  ///< EOS included
  std::string text, error;
  engine_core::CacheReport cache;
  int64_t drafted = 0, accepted = 0;
  std::optional<engine_core::FinishReason> finish;
};

/// Scheduler, caches, filters and, with drafts, the MTP drafter over the shipped model.
class NanoMachine {
 public:
  struct Options {
    int64_t max_running = 8;
    int64_t num_pages = 256;
    bool drafts = false;                   ///< one before every token, whatever it costs
    engine_core::Sampler* sampler = nullptr;    ///< null: the engine's own
    engine_core::PrefixStore* store = nullptr;  ///< null: none
  };

  explicit NanoMachine(const Options& options)
      : cache_(Nano::get().model.config(),
               {.numerics = Nano::get().numerics,
                .num_pages = options.num_pages,
                .num_slots = options.max_running,
                .slack = 1,
                .with_mtp = options.drafts}),
        sampler_(Nano::get().tokenizer.vocab_size()),
        runner_(
            Nano::get().model, cache_, options.sampler != nullptr ? *options.sampler : sampler_),
        filters_(Nano::get().tokenizer) {
    if (options.drafts) drafter_ = std::make_unique<engine::MtpDrafter>(runner_, sampler_);
    const model::ModelConfig& config = Nano::get().model.config();
    const engine_core::EngineInfo info{.model_name = "hadal-nano",
                                  .vocab_size = Nano::get().tokenizer.vocab_size(),
                                  .max_context = options.num_pages * cache_.page_tokens(),
                                  .max_choices = options.max_running,
                                  .eos_token = config.eos_token_id};
    engine_core::SchedulerOptions scheduling;
    scheduling.max_running = options.max_running;
    scheduling.max_waiting = 4096;
    scheduling.max_drafts = options.drafts ? 1 : 0;
    scheduling.always_draft = options.drafts;
    scheduler_ =
        std::make_unique<engine_core::Scheduler>(info, scheduling,
                                            engine_core::SchedulerParts{.runner = runner_,
                                                                   .memory = cache_,
                                                                   .filters = filters_,
                                                                   .drafter = drafter_.get(),
                                                                   .store = options.store});
  }

  std::shared_ptr<NanoAnswer> add(engine_core::Request request) {
    auto answer = std::make_shared<NanoAnswer>();
    scheduler_->add(next_id_++, scheduler_->prepare(std::move(request), answer));
    return answer;
  }
  /// Until nothing is left to do.
  void run() {
    while (scheduler_->step()) {
    }
    scheduler_->check_integrity();
  }
  std::shared_ptr<NanoAnswer> answer(engine_core::Request request) {
    auto result = add(std::move(request));
    run();
    return result;
  }

  engine_core::Scheduler& scheduler() { return *scheduler_; }
  int64_t page_tokens() const { return cache_.page_tokens(); }

 private:
  engine::KvCache cache_;
  engine::ModelSampler sampler_;
  engine::ModelRunner runner_;
  engine_core::TextFilters filters_;
  std::unique_ptr<engine::MtpDrafter> drafter_;
  std::unique_ptr<engine_core::Scheduler> scheduler_;
  uint64_t next_id_ = 1;
};

/// A rendered prompt's ids.
inline std::vector<int64_t> prompt_ids(const text::ChatPrompt& prompt) {
  const std::vector<int32_t> ids = Nano::get().tokenizer.encode(prompt.text, prompt.foreign);
  return {ids.begin(), ids.end()};
}

}  // namespace hadal::testing
