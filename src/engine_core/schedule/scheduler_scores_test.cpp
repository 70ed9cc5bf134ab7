// Scores of prompts, requests without an answer, tokens that end one.
#include <stdexcept>

#include <gtest/gtest.h>

#include "base/log.h"
#include "testing/scheduler_world.h"

namespace hadal::engine_core {
namespace {

using testing::scripted::Answer;
using testing::scripted::Config;
using testing::scripted::counting;
using testing::scripted::expected_scores;
using testing::scripted::plain;
using testing::scripted::Tokens;
using testing::scripted::World;

Request scored(Tokens prompt, int64_t max_tokens, int64_t top) {
  Request request = plain(std::move(prompt), max_tokens);
  request.prompt_logprobs = top;
  return request;
}

TEST(Scheduler, ScoresAPromptInChunksHoweverMuchOfItIsKnown) {
  Config config;
  config.scheduler.step_tokens = config.scheduler.prompt_tokens = 7;
  World world(config);
  world.add(plain(counting(30), 1));
  world.run_to_end();
  for (const int64_t max_tokens : {0, 1, 5}) {
    const Request request = scored(counting(50), max_tokens, 3);
    const auto sink = world.add(request);
    world.run_to_end();
    EXPECT_EQ(sink->scores, expected_scores(world.model, request)) << max_tokens;
    EXPECT_EQ(sink->answers[0], world.expected(request)) << max_tokens;
    EXPECT_EQ(sink->answers[0].tokens.size(), static_cast<size_t>(max_tokens));
    EXPECT_EQ(sink->cache.cached_tokens, 0);
    EXPECT_STREQ(sink->cache.miss, "scored");
  }
  // Who does not ask has the prefix.
  const auto sink = world.add(plain(counting(50), 1));
  world.run_to_end();
  EXPECT_EQ(sink->cache.cached_tokens, 49);
  EXPECT_TRUE(sink->scores.empty());
}

TEST(Scheduler, WhatNeedsNoScoreIsNotComputedAgain) {
  World world(Config{});
  world.add(plain(counting(40), 1));
  world.run_to_end();
  Request request = scored(counting(50), 2, 1);
  for (const int64_t from : {49, 41, 40, 39, 20, 1, 0}) {
    request.prompt_logprobs_from = from;
    world.scheduler.clear_prefix_tree();
    world.add(plain(counting(40), 1));
    world.run_to_end();
    const auto sink = world.add(request);
    world.run_to_end();
    EXPECT_EQ(sink->scores, expected_scores(world.model, request)) << from;
    EXPECT_EQ(sink->answers[0], world.expected(request)) << from;
    // States lie at pages of four tokens, and one before the last token of what came first.
    EXPECT_GE(sink->cache.cached_tokens, std::min<int64_t>(from, 40) - 4) << from;
    EXPECT_LT(sink->cache.cached_tokens, std::max<int64_t>(from, 1)) << from;
  }
  request.prompt_logprobs_from = 50;
  EXPECT_THROW(world.add(request), InputError);
  request.prompt_logprobs_from = -1;
  EXPECT_THROW(world.add(request), InputError);
}

TEST(Scheduler, AStoreDoesNotHideWhatIsToBeScored) {
  Config config;
  config.store = true;
  World world(config);
  world.add(plain(counting(40), 1));
  world.run_to_end();
  world.scheduler.clear_prefix_tree();
  const Request request = scored(counting(44), 2, 0);
  const auto sink = world.add(request);
  world.run_to_end();
  EXPECT_EQ(sink->scores, expected_scores(world.model, request));
  EXPECT_EQ(world.store.num_read, 0);
}

TEST(Scheduler, APromptOfTheWholeContextCanBeScored) {
  Config config;
  config.max_context = 60;
  World world(config);
  const Request request = scored(counting(60), 0, 1);
  const auto sink = world.add(request);
  world.run_to_end();
  EXPECT_EQ(sink->scores, expected_scores(world.model, request));
  EXPECT_EQ(sink->answers[0].finish, FinishReason::kLength);
  EXPECT_THROW(world.add(scored(counting(60), 1, 1)), InputError);
  EXPECT_THROW(world.add(scored(counting(61), 0, 1)), InputError);
}

TEST(Scheduler, AScoredPromptGoesOnWhereItWasPreempted) {
  Config config;
  config.model.num_pages = 20;  // 80 tokens
  config.scheduler.step_tokens = config.scheduler.prompt_tokens = 8;
  World world(config);
  const Request request = scored(counting(60), 4, 2);
  const auto sink = world.add(request);
  for (int i = 0; i < 4; ++i) world.scheduler.step();
  Request urgent = plain(counting(60, 7), 8);
  urgent.priority = 1;
  world.add(urgent);
  int64_t rows = 0;
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    for (const SequenceStep& step : steps)
      rows += step.scored.targets.empty() ? 0 : std::ssize(step.tokens);
  };
  world.run_to_end();
  EXPECT_GT(world.scheduler.stats().preemptions, 0);
  EXPECT_LT(rows, 60) << "it begins again";
  EXPECT_EQ(sink->scores, expected_scores(world.model, request));
  EXPECT_EQ(sink->answers[0], world.expected(request));
}

TEST(Scheduler, StopTokensEndAnAnswerAndMinTokensPutItOff) {
  World world({});
  Request request = plain(counting(5), 30);
  const Answer free = world.expected(request);
  request.stop_tokens = {free.tokens[4], free.tokens[9]};
  auto sink = world.add(request);
  world.run_to_end();
  EXPECT_EQ(sink->answers[0].finish, FinishReason::kStop);
  EXPECT_EQ(sink->answers[0].stop_token, sink->answers[0].tokens.back());
  EXPECT_LE(sink->answers[0].tokens.size(), 5u);
  EXPECT_EQ(sink->answers[0], world.expected(request));
  request.min_tokens = 8;
  sink = world.add(request);
  world.run_to_end();
  EXPECT_GT(sink->answers[0].tokens.size(), 8u);
  EXPECT_EQ(sink->answers[0], world.expected(request));
  request.stop_tokens = {32};
  EXPECT_THROW(world.add(request), InputError);
  request.stop_tokens = {};
  request.min_tokens = 31;
  EXPECT_THROW(world.add(request), InputError);
}

}  // namespace
}  // namespace hadal::engine_core
