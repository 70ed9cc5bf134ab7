// E1 of the engine: the full logits that every token was drawn from are the same bits alone and in
// any company, chunking, preemption, with hits in memory and on disk, and with drafts.
#include <algorithm>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/hash.h"
#include "engine/local_engine.h"
#include "engine/mtp_drafter.h"
#include "engine/sampler.h"
#include "engine_core/disk_store.h"
#include "engine_core/scheduler.h"
#include "testing/tiny_model.h"

namespace hadal::engine {
namespace {

using ops::Numerics;

/// What a token came from: its logits, all of them, and the choice.
struct Drawn {
  uint64_t logits = 0;
  int64_t token = 0;
  friend bool operator==(const Drawn&, const Drawn&) = default;
};

/// Samples as the engine does and remembers by seed, choice and position.
class RecordingSampler final : public Sampler {
 public:
  explicit RecordingSampler(int64_t vocab) : sampler_(vocab) {}
  Sampled sample(const SampleInput& input) override {
    Sampled sampled = sampler_.sample(input);
    const std::string_view bytes(reinterpret_cast<const char*>(input.logits.data()),
                                 input.logits.size_bytes());
    drawn[{input.sampling.seed, input.choice, input.pos}] = {fnv1a64(bytes), sampled.token};
    return sampled;
  }
  using Key = std::tuple<uint64_t, int64_t, int64_t>;
  std::map<Key, Drawn> drawn;

 private:
  ModelSampler sampler_;
};

class NoFilter final : public AnswerFilter {
 public:
  std::span<const int32_t> mask() override { return {}; }
  Accepted accept(int64_t) override { return {}; }
  std::string finish() override { return {}; }
};
class NoFilters final : public AnswerFilters {
 public:
  std::unique_ptr<AnswerFilter> create(const Request&) override {
    return std::make_unique<NoFilter>();
  }
};

struct Answer final : Sink {
  void on_update(Update update) override {
    if (!update.error.empty()) error = update.error;
    for (const OutputToken& token : update.tokens) tokens[update.choice].push_back(token.token);
    cached = update.cache.cached_tokens;
    disk = update.cache.disk_tokens;
    drafted += update.drafted;
    if (update.finish) ++finished;
  }
  std::map<int64_t, std::vector<int64_t>> tokens;
  std::string error;
  int64_t cached = 0, disk = 0, drafted = 0;
  int finished = 0;
};

struct Setup {
  const char* name;
  bool small;
  Numerics numerics;
};
void PrintTo(const Setup& setup, std::ostream* out) { *out << setup.name; }

/// A model with its engine, without the thread.
struct Machine {
  KvCache cache;
  ModelRunner runner;
  RecordingSampler sampler;
  NoFilters filters;
  std::unique_ptr<MtpDrafter> drafter;
  std::unique_ptr<Scheduler> scheduler;
  uint64_t next_id = 1;

  Machine(const model::Transformer& model,
          const KvCacheOptions& memory,
          const SchedulerOptions& options,
          PrefixStore* store)
      : cache(model.config(), memory), runner(model, cache), sampler(model.config().vocab_size) {
    if (memory.with_mtp) drafter = std::make_unique<MtpDrafter>(runner, sampler);
    const EngineInfo info{
        .model_name = "test",
        .vocab_size = model.config().vocab_size,
        .max_context = std::min<int64_t>(memory.num_pages * cache.page_tokens(), 4096),
        .max_choices = 4,
        .eos_token = -1};
    scheduler = std::make_unique<Scheduler>(info, options,
                                            SchedulerParts{.runner = runner,
                                                           .memory = cache,
                                                           .sampler = sampler,
                                                           .filters = filters,
                                                           .drafter = drafter.get(),
                                                           .store = store});
  }
  std::shared_ptr<Answer> add(const Request& request) {
    auto answer = std::make_shared<Answer>();
    scheduler->add(next_id++, scheduler->prepare(request, answer));
    return answer;
  }
};

class Schedules : public ::testing::TestWithParam<Setup> {
 protected:
  static constexpr int kRequests = 12;
  void SetUp() override {
    config_ = GetParam().small ? testing::small_config() : testing::tiny_config();
    model_ = std::make_unique<model::Transformer>(testing::random_model(config_, 21, at::kFloat));
    const Numerics numerics = GetParam().numerics;
    model_->visit([&](model::Parameter& p) {
      const bool rounded = p.is_matrix() || p.kind == model::ParamKind::kEmbedding ||
                           p.kind == model::ParamKind::kHead;
      if (rounded && numerics != Numerics::kIdeal) p.value = p.operand(numerics).contiguous();
    });
    // Prompts that begin alike, with the same page, with half of it, and not at all.
    std::vector<int64_t> shared(600);
    for (int64_t& id : shared) id = token();
    for (int i = 0; i < kRequests; ++i) {
      Request request;
      const int64_t common[] = {0, 100, 300, 540};
      request.prompt.assign(shared.begin(), shared.begin() + common[i % 4]);
      const auto own = 1 + static_cast<int64_t>(random_() % 60);
      for (int64_t t = 0; t < own; ++t) request.prompt.push_back(token());
      request.max_tokens = 1 + static_cast<int64_t>(random_() % 24);
      request.n = i % 5 == 4 ? 2 : 1;
      request.sampling.temperature = i % 3 == 0 ? 0.0 : 0.9;
      request.sampling.top_p = 0.9;
      request.sampling.seed = static_cast<uint64_t>(1000 + i);
      request.priority = i % 2;
      requests_.push_back(request);
    }
    for (const Request& request : requests_) {
      Machine machine(*model_, memory(16, 4), {}, nullptr);
      const auto answer = machine.add(request);
      while (machine.scheduler->step()) {
      }
      ASSERT_EQ(answer->error, "");
      alone_.insert(machine.sampler.drawn.begin(), machine.sampler.drawn.end());
      tokens_.push_back(answer->tokens);
    }
  }
  int64_t token() {
    return static_cast<int64_t>(random_() % static_cast<unsigned>(config_.vocab_size));
  }
  KvCacheOptions memory(int64_t pages, int64_t slots, bool with_mtp = false) const {
    return {.numerics = GetParam().numerics,
            .num_pages = pages,
            .num_slots = slots,
            .slack = 3,
            .with_mtp = with_mtp};
  }

  /// Every request in random order and company; all it draws must be what it drew alone.
  void run(Machine& machine, EngineStats* stats = nullptr) {
    std::vector<size_t> order(requests_.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    std::vector<std::shared_ptr<Answer>> answers(order.size());
    for (const size_t i : order) {
      answers[i] = machine.add(requests_[i]);
      for (auto steps = random_() % 5; steps > 0; --steps) {
        machine.scheduler->step();
        machine.scheduler->check_integrity();
      }
    }
    while (machine.scheduler->step()) machine.scheduler->check_integrity();
    for (size_t i = 0; i < answers.size(); ++i) {
      ASSERT_EQ(answers[i]->error, "");
      ASSERT_EQ(answers[i]->finished, requests_[i].n);
      ASSERT_EQ(answers[i]->tokens, tokens_[i]) << "request " << i;
      cached_ += answers[i]->cached;
      disk_ += answers[i]->disk;
      drafted_ += answers[i]->drafted;
    }
    for (const auto& [key, drawn] : machine.sampler.drawn) {
      const auto wanted = alone_.find(key);
      // Behind a rejected draft or the end of an answer nothing was drawn alone.
      if (wanted != alone_.end()) {
        ASSERT_EQ(drawn, wanted->second)
            << "seed " << std::get<0>(key) << " position " << std::get<2>(key);
      }
    }
    if (stats != nullptr) *stats = machine.scheduler->stats();
  }

  model::ModelConfig config_;
  std::unique_ptr<model::Transformer> model_;
  std::mt19937 random_{77};
  std::vector<Request> requests_;
  std::map<RecordingSampler::Key, Drawn> alone_;
  std::vector<std::map<int64_t, std::vector<int64_t>>> tokens_;
  int64_t cached_ = 0, disk_ = 0, drafted_ = 0;
};

TEST_P(Schedules, AnyCompanyChunkingPreemptionAndDraftsGiveTheSameLogits) {
  int64_t preemptions = 0;
  for (int round = 0; round < (GetParam().small ? 10 : 20); ++round) {
    SchedulerOptions options;
    options.max_running = 1 + static_cast<int64_t>(random_() % 6);
    options.step_tokens = 4 + static_cast<int64_t>(random_() % 120);
    options.prompt_tokens = options.step_tokens + static_cast<int64_t>(random_() % 300);
    const bool drafts = round % 3 == 1;
    if (drafts) {
      options.max_drafts = 1;
      options.always_draft = true;
    }
    const int64_t pages = round % 2 == 0 ? 5 : 24;
    Machine machine(*model_, memory(pages, options.max_running + 2, drafts), options, nullptr);
    EngineStats stats;
    run(machine, &stats);
    if (HasFatalFailure()) return;
    preemptions += stats.preemptions;
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_GT(cached_, 0);
  EXPECT_GT(drafted_, 0);
}

TEST_P(Schedules, PrefixesFromDiskGiveTheSameLogits) {
  const std::string folder =
      (std::filesystem::temp_directory_path() / concat("hadal-schedules-", GetParam().name))
          .string();
  std::filesystem::remove_all(folder);
  // Stored and found, first with snapshots, then with states that are computed again.
  for (int round = 0; round < 4; ++round) {
    if (round == 2) std::filesystem::remove_all(folder);
    DiskStoreOptions options;
    options.policy = round < 2 ? WindowPolicy::kPeriodic : WindowPolicy::kZero;
    options.folder = folder;
    options.identity = GetParam().name;
    options.page_tokens = page_tokens_of(config_);
    options.period = options.page_tokens;
    DiskStore store(options);
    Machine machine(*model_, memory(24, 8), {}, &store);
    disk_ = 0;
    run(machine);
    if (HasFatalFailure()) break;
    store.flush();
    if (round % 2 == 1) {
      EXPECT_GT(disk_, 0);
    }
  }
  std::filesystem::remove_all(folder);
}

INSTANTIATE_TEST_SUITE_P(Numerics,
                         Schedules,
                         ::testing::Values(Setup{"tiny_ideal", false, Numerics::kIdeal},
                                           Setup{"tiny_bf16", false, Numerics::kBf16},
                                           Setup{"small_released", true, Numerics::kReleased}),
                         [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace hadal::engine
