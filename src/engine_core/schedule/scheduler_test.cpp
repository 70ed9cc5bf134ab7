#include "engine_core/schedule/scheduler.h"

#include <algorithm>
#include <chrono>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/log.h"
#include "testing/scheduler_world.h"

namespace hadal::engine_core {
namespace {

using testing::scripted::Answer;
using testing::scripted::Config;
using testing::scripted::counting;
using testing::scripted::plain;
using testing::scripted::Recorder;
using testing::scripted::Tokens;
using testing::scripted::World;

TEST(Scheduler, RunningAnswersKeepTheirPaceWhileALongPromptArrives) {
  Config config;
  config.model.num_pages = 200;
  config.scheduler.step_tokens = 8;
  config.max_context = 700;
  World world(config);
  auto answer = world.add(plain(counting(3), 100));
  for (int i = 0; i < 4; ++i) world.scheduler.step();
  auto long_prompt = world.add(plain(counting(400, 2), 2));
  const Request brief = plain(counting(9, 5), 2);
  auto short_prompt = world.add(brief);
  const auto before = static_cast<int64_t>(answer->answers[0].tokens.size());
  int64_t rows = 0;
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    rows = 0;
    for (const SequenceStep& step : steps) rows += static_cast<int64_t>(step.tokens.size());
    EXPECT_LE(rows, 8);
  };
  for (int i = 0; i < 12; ++i) world.scheduler.step();
  EXPECT_EQ(static_cast<int64_t>(answer->answers[0].tokens.size()), before + 12);
  EXPECT_EQ(short_prompt->finished, 1) << "it does not wait for the long one";
  EXPECT_EQ(long_prompt->updates, 0);
  world.run_to_end();
  EXPECT_EQ(long_prompt->finished, 1);
  EXPECT_EQ(short_prompt->answers[0], world.expected(brief));
}

TEST(Scheduler, ClientsShareTheMachine) {
  Config config;
  config.scheduler.max_running = 1;
  World world(config);
  std::vector<std::pair<std::string, std::shared_ptr<Recorder>>> sent;
  const auto send = [&](const std::string& client, int priority) {
    Request request = plain(counting(5, static_cast<int64_t>(sent.size())), 5);
    request.client = client;
    request.priority = priority;
    sent.emplace_back(client, world.add(request));
  };
  for (int i = 0; i < 30; ++i) send("greedy", 0);
  for (int i = 0; i < 5; ++i) send("modest", 0);
  std::string order;
  std::set<size_t> seen;
  const auto note = [&] {
    for (size_t i = 0; i < sent.size(); ++i) {
      if (sent[i].second->finished > 0 && seen.insert(i).second) order += sent[i].first[0];
    }
  };
  for (int i = 0; i < 14; ++i) {
    world.scheduler.step();
    note();
  }
  send("urgent", 1);
  while (world.scheduler.step()) note();
  note();
  ASSERT_EQ(order.size(), 36u);
  const std::string first(order.substr(0, 11));
  EXPECT_EQ(std::ranges::count(first, 'm'), 5) << order;
  EXPECT_LT(order.find('u'), 4u) << order;
}

TEST(Scheduler, HigherPriorityPreemptsAndTheOtherResumes) {
  Config config;
  config.model.num_pages = 8;
  World world(config);
  const Request low = plain(counting(12), 16);
  Request high = plain(counting(16, 7), 12);
  high.priority = 1;
  auto first = world.add(low);
  for (int i = 0; i < 6; ++i) world.scheduler.step();
  auto second = world.add(high);
  while (second->finished == 0) world.scheduler.step();
  EXPECT_EQ(first->finished, 0);
  world.run_to_end();
  EXPECT_GT(world.scheduler.stats().preemptions, 0);
  EXPECT_EQ(first->answers[0], world.expected(low));
  EXPECT_EQ(second->answers[0], world.expected(high));
}

TEST(Scheduler, CancelAndDeadlineFreeEverythingWithinOneStep) {
  World world(Config{});
  Request request = plain(counting(9), 50);
  request.n = 3;
  request.use_prefix_cache = false;
  auto cancelled = world.add(request);
  for (int i = 0; i < 5; ++i) world.scheduler.step();
  EXPECT_EQ(world.scheduler.stats().running, 3);
  world.scheduler.cancel(world.last_id);
  world.scheduler.cancel(999);
  EXPECT_EQ(cancelled->finished, 3);
  EXPECT_EQ(world.scheduler.stats().pages_free, world.scheduler.stats().pages_total);
  EXPECT_EQ(world.scheduler.stats().state_slots_free, world.scheduler.stats().state_slots_total);
  request.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
  auto late = world.add(request);
  world.scheduler.step();
  while (std::chrono::steady_clock::now() < *request.deadline) continue;
  EXPECT_FALSE(world.scheduler.step());
  EXPECT_EQ(late->answers[2].finish, FinishReason::kDeadline);
  EXPECT_EQ(world.scheduler.stats().pages_free, world.scheduler.stats().pages_total);
  EXPECT_EQ(world.scheduler.stats().cancelled, 2);
}

TEST(Scheduler, AFailingStepFailsOnlyTheRequestThatMakesItFail) {
  log::set_level(log::Level::kError);
  World world(Config{});
  std::vector<Request> requests;
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int64_t i = 0; i < 4; ++i) requests.push_back(plain(counting(6, i), 12));
  requests[2].prompt[3] = 31;  // poison once it is run
  requests[1].prompt[3] = 30;
  for (const Request& request : requests) sinks.push_back(world.add(request));
  int hiccups = 1;
  int64_t steps = 0;
  world.model.on_run = [&](std::span<const SequenceStep> all) {
    for (const SequenceStep& step : all) {
      for (const int64_t token : step.tokens) HADAL_CHECK(token != 31, "poison");
    }
    if (++steps == 9 && hiccups-- > 0) throw std::runtime_error("a passing trouble");
  };
  requests[0].sampling.temperature = 0;
  world.run_to_end();
  EXPECT_EQ(sinks[2]->answers[0].finish, FinishReason::kError);
  EXPECT_NE(sinks[2]->answers[0].error.find("poison"), std::string::npos);
  int64_t poisoned = 0;
  for (size_t i = 0; i < 4; ++i) {
    const Answer expected = world.expected(requests[i]);
    // An answer may draw the poisoned token itself.
    const bool poison = std::ranges::find(expected.tokens, 31) != expected.tokens.end() || i == 2;
    poisoned += poison ? 1 : 0;
    if (!poison) {
      EXPECT_EQ(sinks[i]->answers[0], expected);
    }
  }
  EXPECT_LT(poisoned, 3);
  EXPECT_GE(world.scheduler.stats().failed, 1);
  log::set_level(log::Level::kInfo);
}

TEST(Scheduler, ASinkThatThrowsEndsItsRequestOnly) {
  World world(Config{});
  auto bad = world.add(plain(counting(4), 40));
  bad->throws = true;
  const Request request = plain(counting(4, 9), 8);
  auto good = world.add(request);
  world.run_to_end();
  EXPECT_EQ(bad->updates, 1);
  EXPECT_EQ(good->answers[0], world.expected(request));
  EXPECT_EQ(world.scheduler.stats().cancelled, 1);
}

TEST(Scheduler, ChoicesShareThePrompt) {
  World world(Config{});
  Request request = plain(counting(17), 3);
  request.n = 4;
  request.sampling.temperature = 1;
  int64_t rows = 0;
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    for (const SequenceStep& step : steps) rows += static_cast<int64_t>(step.tokens.size());
  };
  auto sink = world.add(request);
  world.run_to_end();
  EXPECT_EQ(rows, 17 + 4 * 2);
  std::set<Tokens> different;
  for (int64_t choice = 0; choice < 4; ++choice) {
    EXPECT_EQ(sink->answers[choice], world.expected(request, choice));
    different.insert(sink->answers[choice].tokens);
  }
  EXPECT_GT(different.size(), 2u);
  EXPECT_EQ(world.scheduler.stats().prompt_tokens, 17);
}

TEST(Scheduler, ConversationsAreReusedToTheLastToken) {
  World world(Config{});
  Tokens conversation = counting(10);
  for (int64_t turn = 0; turn < 5; ++turn) {
    auto sink = world.add(plain(conversation, 6));
    world.run_to_end();
    EXPECT_EQ(sink->cache.prompt_tokens, static_cast<int64_t>(conversation.size()));
    // All but the last drawn token, which was never run, and the new message.
    EXPECT_EQ(sink->cache.cached_tokens,
              turn == 0 ? 0 : static_cast<int64_t>(conversation.size()) - 4);
    EXPECT_STREQ(sink->cache.miss, turn == 0 ? "new" : "none");
    const Tokens& answer = sink->answers[0].tokens;
    conversation.insert(conversation.end(), answer.begin(), answer.end());
    for (int64_t i = 0; i < 3; ++i) conversation.push_back(5 + turn + i);
  }
  // The same prompt again: all but its last token.
  auto again = world.add(plain(conversation, 1));
  auto once_more = world.add(plain(conversation, 1));
  world.run_to_end();
  auto third = world.add(plain(conversation, 1));
  world.run_to_end();
  EXPECT_EQ(third->cache.cached_tokens, static_cast<int64_t>(conversation.size()) - 1);
  EXPECT_STREQ(third->cache.miss, "none");
}

TEST(Scheduler, WhatWasBrokenOffGoesOnWhereItStood) {
  World world(Config{});
  Tokens conversation = counting(10);
  auto broken_off = world.add(plain(conversation, 50));
  while (broken_off->answers[0].tokens.size() < 8) world.scheduler.step();
  world.scheduler.cancel(world.last_id);
  EXPECT_EQ(broken_off->answers[0].finish, FinishReason::kCancelled);
  const Tokens answer = broken_off->answers[0].tokens;
  conversation.insert(conversation.end(), answer.begin(), answer.end());
  conversation.push_back(5);
  auto next = world.add(plain(conversation, 6));
  world.run_to_end();
  // No multiple of the snapshots' interval; the last drawn token was never run.
  EXPECT_EQ(next->cache.cached_tokens, 17);
  EXPECT_EQ(next->answers[0], world.expected(plain(conversation, 6)));

  // In the middle of a prompt, by its deadline.
  Config config;
  config.scheduler.step_tokens = config.scheduler.prompt_tokens = 3;
  World slow(config);
  Request request = plain(counting(60), 6);
  request.deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
  auto late = slow.add(request);
  for (int i = 0; i < 3; ++i) slow.scheduler.step();
  while (std::chrono::steady_clock::now() < *request.deadline) continue;
  slow.scheduler.step();
  EXPECT_EQ(late->answers[0].finish, FinishReason::kDeadline);
  request.deadline.reset();
  auto again = slow.add(request);
  slow.run_to_end();
  EXPECT_EQ(again->cache.cached_tokens, 3 + 1 + 3);
  EXPECT_EQ(again->answers[0], slow.expected(request));
}

TEST(Scheduler, SpeculationTakesFewerStepsOrStops) {
  for (const uint64_t right : {uint64_t{256}, uint64_t{0}}) {
    Config config;
    config.scheduler.max_drafts = 3;
    config.scheduler.cache.snapshot_interval = 64;
    config.scheduler.always_draft = right == 256;
    config.drafts_right = right;
    config.max_context = 230;
    config.model.num_pages = 100;
    World world(config);
    const Request request = plain(counting(5), 200);
    auto sink = world.add(request);
    world.run_to_end();
    EXPECT_EQ(sink->answers[0], world.expected(request));
    const EngineStats stats = world.scheduler.stats();
    if (right == 256) {
      EXPECT_EQ(stats.accepted, stats.drafted);
      EXPECT_LT(stats.steps, 60);
    } else {
      EXPECT_LT(stats.drafted, 80) << "it looks again now and then";
      EXPECT_GE(stats.drafted, 4);
    }
  }
}

TEST(Scheduler, ALargeRequestIsNotStarvedBySmallOnes) {
  Config config;
  config.model.num_pages = 20;
  World world(config);
  for (int64_t i = 0; i < 6; ++i) world.add(plain(counting(6, i), 10));
  Request large = plain(counting(60), 4);
  large.client = "large";
  auto sink = world.add(large);
  int64_t steps = 0;
  for (; sink->finished == 0 && steps < 400; ++steps) {
    world.scheduler.step();
    // Small ones of new clients keep coming.
    Request small = plain(counting(6, steps), 10);
    small.client = concat("client ", steps);
    world.add(small);
  }
  EXPECT_LT(steps, 120);
  EXPECT_EQ(sink->answers[0], world.expected(large));
}

TEST(Scheduler, RefusesWhatIsNotValid) {
  World world(Config{});
  const auto refuse = [&](auto change) {
    Request request = plain(counting(4), 4);
    change(request);
    EXPECT_THROW(world.scheduler.prepare(request, nullptr), InputError);
  };
  refuse([](Request& request) { request.prompt.clear(); });
  refuse([](Request& request) { request.prompt[0] = 32; });
  refuse([](Request& request) { request.prompt = counting(200); });
  refuse([](Request& request) { request.max_tokens = -1; });
  refuse([](Request& request) { request.n = 5; });
  refuse([](Request& request) { request.sampling.top_p = 0; });
  refuse([](Request& request) { request.sampling.temperature = -1; });
  refuse([](Request& request) { request.sampling.logit_bias = {{-1, 2.0}}; });
}

}  // namespace
}  // namespace hadal::engine_core
