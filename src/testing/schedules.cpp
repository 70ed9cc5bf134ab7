#include "testing/schedules.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <optional>
#include <unistd.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/hash.h"
#include "base/math.h"
#include "engine/dspark_drafter.h"
#include "engine/kv_cache.h"
#include "engine/model_runner.h"
#include "engine/mtp_drafter.h"
#include "engine/sampler.h"
#include "engine_core/schedule/scheduler.h"
#include "testing/no_filter.h"

namespace hadal::testing {

using engine_core::Request;

namespace {

/// Samples as the engine does and remembers.
class RecordingSampler final : public engine_core::Sampler {
 public:
  explicit RecordingSampler(int64_t vocab) : sampler_(vocab) {}
  void sample(std::span<const engine_core::DrawInput> inputs,
              std::span<engine_core::Sampled> sampled) override {
    sampler_.sample(inputs, sampled);
    for (size_t i = 0; i < inputs.size(); ++i) {
      const auto& [draw, logits] = inputs[i];
      const std::string_view bytes(reinterpret_cast<const char*>(logits.data()),
                                   logits.size_bytes());
      drawn[{draw.sampling->seed, draw.choice, draw.pos}] = {fnv1a64(bytes), sampled[i].token};
    }
  }
  engine_core::TokenScore score(std::span<const float> logits,
                                int64_t token,
                                int64_t top) const override {
    return sampler_.score(logits, token, top);
  }
  std::map<Schedules::Key, Drawn> drawn;

 private:
  engine::ModelSampler sampler_;
};

struct Answer final : engine_core::Sink {
  void on_update(engine_core::Update update) override {
    if (!update.error.empty()) error = update.error;
    for (const engine_core::OutputToken& token : update.tokens)
      tokens[update.choice].push_back(token.token);
    cached = update.cache.cached_tokens;
    disk = update.cache.disk_tokens;
    if (update.prompt_scores) scores = update.prompt_scores;
    if (update.finish) ++finished;
  }
  std::map<int64_t, std::vector<int64_t>> tokens;
  std::shared_ptr<const std::vector<engine_core::TokenScore>> scores;
  std::string error;
  int64_t cached = 0, disk = 0;
  int finished = 0;
};

}  // namespace

/// A model with its engine, without the thread.
struct Schedules::Machine {
  engine::KvCache cache;
  RecordingSampler sampler;
  engine::ModelRunner runner;
  NoFilters filters;
  std::unique_ptr<engine_core::Drafter> drafter;
  std::unique_ptr<engine_core::Scheduler> scheduler;
  uint64_t next_id = 1;

  Machine(const model::Transformer& model,
          const engine::KvCacheOptions& memory,
          const engine_core::SchedulerOptions& options,
          int64_t max_context,
          engine_core::PrefixStore* store)
      : cache(model.config(), memory),
        sampler(model.config().vocab_size),
        runner(model, cache, sampler) {
    if (runner.block_size() > 0)
      drafter = std::make_unique<engine::DsparkDrafter>(runner, sampler, /*threshold=*/0.3);
    else if (memory.with_mtp)
      drafter = std::make_unique<engine::MtpDrafter>(runner, sampler);
    const engine_core::EngineInfo info{
        .model_name = "test",
        .vocab_size = model.config().vocab_size,
        .max_context = std::min(memory.num_pages * cache.page_tokens(), max_context),
        .max_choices = 4,
        .eos_token = -1};
    scheduler = std::make_unique<engine_core::Scheduler>(
        info, options,
        engine_core::SchedulerParts{.runner = runner,
                                    .memory = cache,
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

std::string ScheduleCounts::to_string() const {
  return concat(schedules, " schedules, ", tokens, " tokens compared, company up to ",
                largest_company, ", ", preempted, " preemptions, ", scored,
                " tokens of prompts scored, ", cached, " tokens cached, ", full, "/", periodic, "/",
                zero, " from disk (full/periodic/zero), ", drafted, " drafted, ", accepted,
                " accepted");
}

Schedules::Schedules(const model::Transformer& model,
                     ops::Numerics numerics,
                     const ScheduleShape& shape,
                     uint64_t seed)
    : model_(model),
      numerics_(numerics),
      shape_(shape),
      random_(seed),
      folder_(
          (std::filesystem::temp_directory_path() / concat("hadal-schedules-", getpid(), "-", seed))
              .string()) {
  std::vector<int64_t> shared(static_cast<size_t>(shape.shared));
  for (int64_t& id : shared) id = random(0, model.config().vocab_size - 1);
  for (int i = 0; i < shape.num_requests; ++i) {
    requests_.push_back(draw_request(1000 + static_cast<uint64_t>(i), shared));
  }
  for (const Request& request : requests_) {
    Machine machine(
        model_,
        {.numerics = numerics_,
         .num_pages = ceil_div(shape.max_context, engine::page_tokens_of(model.config())),
         .num_slots = 4,
         .slack = 3,
         .device = shape.device},
        {}, shape.max_context, nullptr);
    const auto answer = machine.add(request);
    while (machine.scheduler->step()) {
    }
    EXPECT_EQ(answer->error, "");
    alone_.insert(machine.sampler.drawn.begin(), machine.sampler.drawn.end());
    tokens_.push_back(answer->tokens);
    scores_.push_back(answer->scores);
  }
}

Schedules::~Schedules() { std::filesystem::remove_all(folder_); }

int64_t Schedules::random(int64_t least, int64_t most) {
  return least + static_cast<int64_t>(random_() % static_cast<uint64_t>(most - least + 1));
}

// Prompts begin with all of the shared beginning, with some of it, or with none.
Request Schedules::draw_request(uint64_t seed, const std::vector<int64_t>& shared) {
  const int64_t common[] = {0, shape_.shared / 6, shape_.shared / 2, shape_.shared,
                            random(0, shape_.shared)};
  Request request;
  request.prompt.assign(shared.begin(), shared.begin() + common[seed % std::size(common)]);
  for (int64_t own = random(1, shape_.max_own); own > 0; --own) {
    request.prompt.push_back(random(0, model_.config().vocab_size - 1));
  }
  request.max_tokens = random(1, shape_.max_answer);
  request.n = seed % 5 == 4 ? 2 : 1;
  request.sampling.temperature = seed % 3 == 0 ? 0.0 : 0.9;
  request.sampling.top_p = 0.9;
  request.sampling.seed = seed;
  request.priority = static_cast<int>(seed % 2);
  if (shape_.scores && seed % 7 == 3) request.prompt_logprobs = 2;
  return request;
}

void Schedules::run() {
  // Few schedules shall see everything: every fourth begins with all the company there is, two of
  // three have a store on disk, the second of them finds what the first left.
  const int64_t round = counts_.schedules;
  const bool crowd = round % 4 == 0;
  engine_core::SchedulerOptions options;
  options.max_running = crowd
                            ? shape_.max_company
                            : static_cast<int64_t>(std::exp2(static_cast<double>(random(0, 1000)) /
                                                             1000 * std::log2(shape_.max_company)));
  options.step_tokens = 4 + random(0, 120);
  options.prompt_tokens =
      options.step_tokens + random(0, std::max<int64_t>(0, shape_.max_chunk - 120));
  constexpr std::array kPolicies = {engine_core::WindowPolicy::kFull,
                                    engine_core::WindowPolicy::kPeriodic,
                                    engine_core::WindowPolicy::kZero};
  const auto policy = static_cast<size_t>(round / 3) % kPolicies.size();
  const bool on_disk = round % 3 != 0;
  const bool drafts = on_disk ? round / 3 / std::ssize(kPolicies) % 2 == 1 : random(0, 1) == 1;
  const int64_t block = model_.config().drafter.block_size;
  options.max_drafts = !drafts ? 0 : block > 0 ? random(1, block) : 1;
  options.always_draft = drafts;
  std::vector<size_t> order(requests_.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), random_);
  if (!crowd) order.resize(static_cast<size_t>(random(1, shape_.num_requests)));
  const engine::KvCacheOptions memory{
      .numerics = numerics_,
      .num_pages = random(0, 1) == 0 ? shape_.small_memory : shape_.large_memory,
      .num_slots = options.max_running + 2,
      .slack = std::max<int64_t>(3, block),
      .with_mtp = drafts,
      .whole_windows = on_disk && kPolicies[policy] == engine_core::WindowPolicy::kFull,
      .device = shape_.device};

  std::unique_ptr<engine_core::DiskStore> store;
  int64_t* from_disk = nullptr;
  if (on_disk) {
    from_disk = std::array{&counts_.full, &counts_.periodic, &counts_.zero}[policy];
    engine_core::DiskStoreOptions disk;
    disk.policy = kPolicies[policy];
    // What is stored with the rows of the MTP block or the drafter is another layout.
    disk.folder = concat(folder_, "/", policy, drafts ? "-drafts" : "");
    disk.identity = "schedules";
    disk.page_tokens = engine::page_tokens_of(model_.config());
    disk.period = disk.page_tokens;
    disk.window_pages = ceil_div(model_.config().window_size, disk.page_tokens);
    std::filesystem::create_directories(folder_);
    store = std::make_unique<engine_core::DiskStore>(disk);
  }
  Machine machine(model_, memory, options, shape_.max_context, store.get());
  int64_t tokens_from_disk = 0;
  std::vector<std::shared_ptr<Answer>> answers;
  const auto step = [&] {
    const bool more = machine.scheduler->step();
    machine.scheduler->check_integrity();
    counts_.largest_company = std::max(counts_.largest_company, machine.scheduler->stats().running);
    return more;
  };
  const int64_t pause = crowd ? 0 : random(0, 1) * random(0, 4);  // at most, between two arrivals
  for (const size_t i : order) {
    answers.push_back(machine.add(requests_[i]));
    for (int64_t steps = random(0, pause); steps > 0; --steps) step();
  }
  while (step()) {
  }
  for (size_t i = 0; i < answers.size(); ++i) {
    ASSERT_EQ(answers[i]->error, "");
    ASSERT_EQ(answers[i]->finished, requests_[order[i]].n);
    ASSERT_EQ(answers[i]->tokens, tokens_[order[i]]) << "request " << order[i];
    ASSERT_EQ(answers[i]->scores == nullptr, scores_[order[i]] == nullptr);
    if (answers[i]->scores != nullptr) {
      ASSERT_EQ(*answers[i]->scores, *scores_[order[i]]) << "request " << order[i];
      counts_.scored += std::ssize(*answers[i]->scores);
    }
    counts_.cached += answers[i]->cached;
    tokens_from_disk += answers[i]->disk;
  }
  for (const auto& [key, drawn] : machine.sampler.drawn) {
    const auto wanted = alone_.find(key);
    // Behind a rejected draft or the end of an answer nothing was drawn alone.
    if (wanted == alone_.end()) continue;
    ++counts_.tokens;
    ASSERT_EQ(drawn, wanted->second)
        << "seed " << std::get<0>(key) << " position " << std::get<2>(key);
  }
  const engine_core::EngineStats stats = machine.scheduler->stats();
  counts_.preempted += stats.preemptions;
  counts_.drafted += stats.drafted;
  counts_.accepted += stats.accepted;
  if (from_disk != nullptr) *from_disk += tokens_from_disk;
  if (store != nullptr) store->flush();
  ++counts_.schedules;
}

int64_t schedules_wanted(int64_t usual) {
  const char* text = std::getenv("HADAL_SCHEDULES");
  return text == nullptr ? usual : std::atoll(text);
}

}  // namespace hadal::testing
