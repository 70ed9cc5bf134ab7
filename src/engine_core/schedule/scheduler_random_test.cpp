#include <algorithm>
#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/log.h"
#include "base/philox.h"
#include "testing/scheduler_world.h"

namespace hadal::engine_core {
namespace {

using testing::scripted::Answer;
using testing::scripted::Config;
using testing::scripted::expected_scores;
using testing::scripted::Recorder;
using testing::scripted::Tokens;
using testing::scripted::World;

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr uint64_t kSchedules = 100;  // sanitizers make everything slow
#else
constexpr uint64_t kSchedules = 500;
#endif

// Random settings from tiny to roomy.
Config random_config(const Philox& random) {
  const auto a = random.block(1), b = random.block(2), c = random.block(3);
  Config config;
  config.model.page_tokens = 2 + a[0] % 5;
  config.model.num_pages = 60 / config.model.page_tokens + 1 + a[1] % (a[1] % 4 == 0 ? 40 : 7);
  config.model.num_slots = 1 + a[2] % 8;
  config.model.window = 1 + a[3] % 6;
  config.model.slack = b[0] % 5;
  config.scheduler.max_running = 1 + b[1] % 8;
  config.scheduler.step_tokens = 1 + b[2] % 24;
  config.scheduler.prompt_tokens = 1 + b[3] % 40;
  config.scheduler.load_pages = 1 + b[3] / 40 % 6;
  config.scheduler.max_drafts = config.model.slack;
  config.scheduler.always_draft = c[0] % 2 == 0;
  config.scheduler.snapshot_prompts = c[1] % 2 == 0;
  config.scheduler.least_shared = 1 + c[1] / 2 % 8;
  config.scheduler.cache.snapshot_interval = config.model.page_tokens * (1 + c[2] % 3);
  config.max_context = 60;
  config.store = c[0] / 2 % 3 > 0;
  if (config.store)
    config.policy =
        std::array{WindowPolicy::kFull, WindowPolicy::kPeriodic, WindowPolicy::kZero}[c[0] / 6 % 3];
  config.model.whole_windows = config.policy == WindowPolicy::kFull;
  return config;
}

Request random_request(const Philox& random, std::vector<Tokens>& prompts) {
  const auto a = random.block(10), b = random.block(11), c = random.block(12);
  Request request;
  if (!prompts.empty() && a[0] % 3 > 0) {
    request.prompt = prompts[a[1] % prompts.size()];
    request.prompt.resize(1 + a[2] % request.prompt.size());
  }
  for (uint32_t more = 1 + a[3] % 12; more > 0; --more) {
    request.prompt.push_back(1 + random.block(20 + more)[0] % 3);
  }
  request.prompt.resize(std::min<size_t>(request.prompt.size(), 50));
  request.max_tokens = 1 + b[0] % 25;
  request.n = b[1] % 4 == 0 ? 1 + b[1] / 4 % 4 : 1;
  request.sampling.temperature = b[2] % 2 == 0 ? 0 : 0.5;
  request.sampling.seed = b[3];
  request.ignore_eos = c[0] % 2 == 0;
  if (c[1] % 3 == 0) request.stop = {std::string(1, static_cast<char>('A' + c[1] / 3 % 26))};
  if (c[1] / 3 % 4 == 0) request.grammar.kind = Grammar::Kind::kRegex;
  request.priority = static_cast<int>(c[2] % 3);
  request.client = std::string(1, static_cast<char>('a' + c[2] / 3 % 3));
  request.use_prefix_cache = c[3] % 6 > 0;
  if (c[3] / 6 % 3 == 0)
    request.cache_key.name = std::string(1, static_cast<char>('k' + c[3] / 18 % 4));
  const auto d = random.block(13);
  if (d[0] % 5 == 0) {
    request.prompt_logprobs = d[0] / 5 % 3;
    if (d[0] / 15 % 2 == 0) request.prompt_logprobs_from = d[0] / 30 % std::ssize(request.prompt);
  }
  if (d[1] % 9 == 0) request.max_tokens = 0;
  if (d[2] % 5 == 0) request.stop_tokens = {d[2] / 5 % 32, d[3] % 32};
  if (d[3] % 4 == 0) request.min_tokens = d[3] / 4 % (request.max_tokens + 1);
  return request;
}

struct Totals {
  int64_t preemptions = 0, cached = 0, accepted = 0, drafted = 0, cancelled = 0, answers = 0,
          scores = 0, from_disk[3] = {};  ///< by policy
};

void run_random_schedule(uint64_t seed, Totals& totals) {
  const Philox random(seed, 0);
  const Config config = random_config(random);
  World world(config);
  // Now and then a step of several sequences throws, half way through.
  const bool hiccups = seed % 5 == 0;
  int64_t runs = 0;
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    if (hiccups && ++runs % 7 == 0 && steps.size() > 1) {
      world.model.run_part(steps.first(steps.size() / 2));
      throw std::runtime_error("hiccup");
    }
  };
  struct Sent {
    uint64_t id;
    Request request;
    std::shared_ptr<Recorder> sink;
    int64_t cancel_at;
  };
  std::vector<Sent> sent;
  std::vector<Tokens> prompts;
  const int64_t count = 3 + random.block(4)[0] % 10;
  int64_t next = 0;
  for (int64_t step = 0; next < count || !world.scheduler.idle(); ++step) {
    ASSERT_LT(step, 5000) << "seed " << seed;
    const auto draw = Philox(seed, 1).block(static_cast<uint64_t>(step));
    while (next < count && (draw[0] % 3 == 0 || world.scheduler.idle())) {
      Request request = random_request(Philox(seed, 100 + static_cast<uint64_t>(next)), prompts);
      prompts.push_back(request.prompt);
      auto sink = world.add(request);
      sent.push_back({world.last_id, std::move(request), std::move(sink),
                      draw[1] % 6 == 0 ? step + draw[2] % 20 : -1});
      ++next;
      if (draw[3] % 2 == 0) break;
    }
    for (const Sent& one : sent) {
      if (one.cancel_at == step) world.scheduler.cancel(one.id);
    }
    // Then the store has what memory forgot.
    if (config.store && draw[1] / 6 % 8 == 0) world.scheduler.clear_prefix_tree();
    world.scheduler.step();
    ASSERT_NO_THROW(world.scheduler.check_integrity()) << "seed " << seed;
  }
  for (const Sent& one : sent) {
    ASSERT_EQ(one.sink->finished, one.request.n) << "seed " << seed;
    for (const auto& [choice, answer] : one.sink->answers) {
      Answer expected = world.expected(one.request, choice);
      if (answer.finish == FinishReason::kCancelled) {
        ++totals.cancelled;
        ASSERT_LE(answer.tokens.size(), expected.tokens.size());
        expected.tokens.resize(answer.tokens.size());
        ASSERT_EQ(answer.tokens, expected.tokens) << "seed " << seed;
        continue;
      }
      ++totals.answers;
      totals.scores += one.request.prompt_logprobs >= 0 ? 1 : 0;
      ASSERT_EQ(one.sink->scores, expected_scores(world.model, one.request)) << "seed " << seed;
      ASSERT_EQ(answer, expected) << "seed " << seed << " request " << one.id << " choice "
                                  << choice;
    }
    // Once more, from what the caches kept.
    if (one.id % 4 != 0) continue;
    auto again = world.add(one.request);
    world.run_to_end();
    for (const auto& [choice, answer] : again->answers) {
      ASSERT_EQ(answer, world.expected(one.request, choice)) << "seed " << seed << " again";
      ASSERT_EQ(again->scores, expected_scores(world.model, one.request)) << "seed " << seed;
    }
  }
  const EngineStats stats = world.scheduler.stats();
  EXPECT_EQ(stats.state_slots_free, stats.state_slots_total);
  EXPECT_EQ(stats.pages_free + stats.pages_cached, stats.pages_total);
  EXPECT_EQ(stats.disk_errors, 0) << "seed " << seed;
  totals.preemptions += stats.preemptions;
  totals.cached += stats.cached_tokens;
  totals.drafted += stats.drafted;
  totals.from_disk[static_cast<size_t>(config.policy)] += stats.disk_tokens;
  totals.accepted += stats.accepted;
}

TEST(Scheduler, RandomSchedulesGiveTheTokensOfEachRequestAlone) {
  log::set_level(log::Level::kError);
  Totals totals;
  for (uint64_t seed = 1; seed <= kSchedules; ++seed) {
    run_random_schedule(seed, totals);
    if (HasFatalFailure()) return;
  }
  const auto scale = static_cast<int64_t>(kSchedules);
  EXPECT_GT(totals.answers, 4 * scale);
  EXPECT_GT(totals.scores, scale);
  EXPECT_GT(totals.preemptions, scale);
  EXPECT_GT(totals.cached, 10 * scale);
  EXPECT_GT(totals.accepted, 2 * scale);
  EXPECT_GT(totals.drafted, totals.accepted);
  EXPECT_GT(totals.cancelled, scale / 5);
  for (const int64_t tokens : totals.from_disk) EXPECT_GT(tokens, scale / 5);
  log::set_level(log::Level::kInfo);
}

}  // namespace
}  // namespace hadal::engine_core
