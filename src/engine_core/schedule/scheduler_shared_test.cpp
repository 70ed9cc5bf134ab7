// Prompts that begin alike and are there together: their beginning is computed once.
#include <stdexcept>

#include <gtest/gtest.h>

#include "base/log.h"
#include "testing/scheduler_world.h"

namespace hadal::engine_core {
namespace {

using testing::scripted::Config;
using testing::scripted::counting;
using testing::scripted::expected_scores;
using testing::scripted::plain;
using testing::scripted::Recorder;
using testing::scripted::Tokens;
using testing::scripted::World;

/// A model whose computed rows are counted.
struct Counting {
  explicit Counting(Config config = {}) : world(config) {
    world.model.on_run = [this](std::span<const SequenceStep> steps) {
      for (const SequenceStep& step : steps) rows += std::ssize(step.tokens);
    };
  }
  World world;
  int64_t rows = 0;
};

Config roomy() {
  Config config;
  config.model.num_pages = 200;
  config.scheduler.prompt_tokens = config.scheduler.step_tokens = 16;
  config.scheduler.max_drafts = 0;
  return config;
}

Tokens behind(Tokens context, int64_t choice, int64_t count) {
  for (int64_t i = 0; i < count; ++i) context.push_back((choice * 5 + i) % 32);
  return context;
}

TEST(SharedPrompts, AContextIsComputedOnce) {
  Counting counted(roomy());
  std::vector<Request> requests;
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int64_t choice = 1; choice <= 4; ++choice) {
    requests.push_back(plain(behind(counting(70), choice, 3 + choice), 3));
    sinks.push_back(counted.world.add(requests.back()));
  }
  counted.world.run_to_end();
  // The context, what is behind it in each, two of the three tokens drawn.
  EXPECT_EQ(counted.rows, 70 + (4 + 5 + 6 + 7) + 4 * 2);
  for (size_t i = 0; i < sinks.size(); ++i) {
    EXPECT_EQ(sinks[i]->answers[0], counted.world.expected(requests[i]));
    EXPECT_EQ(sinks[i]->cache.cached_tokens, i == 0 ? 0 : 70);
    EXPECT_STREQ(sinks[i]->cache.miss, i == 0 ? "new" : "none");
  }
}

TEST(SharedPrompts, TheSamePromptIsComputedOnceButForItsLastToken) {
  Counting counted(roomy());
  const Request request = plain(counting(50), 1);
  for (int i = 0; i < 5; ++i) counted.world.add(request);
  counted.world.run_to_end();
  EXPECT_EQ(counted.rows, 50 + 4);
}

// Each goes on from whoever has the most in common with it: a tree of prompts costs its branches.
TEST(SharedPrompts, BranchesOfBranches) {
  Counting counted(roomy());
  std::vector<Request> requests;
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int64_t branch = 1; branch <= 2; ++branch)
    for (int64_t leaf = 1; leaf <= 3; ++leaf) {
      requests.push_back(plain(behind(behind(counting(40), branch, 40), leaf + 7, 9), 1));
      sinks.push_back(counted.world.add(requests.back()));
    }
  counted.world.run_to_end();
  EXPECT_EQ(counted.rows, 40 + 2 * 40 + 6 * 9);
  for (size_t i = 0; i < sinks.size(); ++i)
    EXPECT_EQ(sinks[i]->answers[0], counted.world.expected(requests[i]));
}

TEST(SharedPrompts, ScoresComeWithTheContext) {
  Counting counted(roomy());
  std::vector<Request> requests;
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int64_t choice = 1; choice <= 4; ++choice) {
    requests.push_back(plain(behind(counting(70), choice, 4), 0));
    requests.back().prompt_logprobs = 2;
    sinks.push_back(counted.world.add(requests.back()));
  }
  counted.world.run_to_end();
  // One of the context is computed in each: the score of what follows comes from its row.
  EXPECT_EQ(counted.rows, 70 + 4 * 4 + 3);
  for (size_t i = 0; i < sinks.size(); ++i) {
    EXPECT_EQ(sinks[i]->scores, expected_scores(counted.world.model, requests[i])) << i;
    EXPECT_STREQ(sinks[i]->cache.miss, "scored");
  }
}

TEST(SharedPrompts, WhoWasWaitedForMayGo) {
  Counting counted(roomy());
  World& world = counted.world;
  world.add(plain(counting(90), 1));
  const Request request = plain(behind(counting(80), 1, 5), 3);
  const auto first = world.add(request), second = world.add(request);
  world.scheduler.step();
  world.scheduler.step();
  world.scheduler.cancel(1);
  world.run_to_end();
  EXPECT_EQ(first->answers[0], world.expected(request));
  EXPECT_EQ(second->answers[0], world.expected(request));
  EXPECT_LE(counted.rows, 32 + 80 + 5 + 2 * 3 + 1) << "the second waits for the first now";
}

TEST(SharedPrompts, AFailureIsTheOwnOnly) {
  log::set_level(log::Level::kError);
  World world(roomy());
  // The first request's last prompt token makes every step throw that runs it.
  Tokens bad = counting(70);
  bad.push_back(0);
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    for (const SequenceStep& step : steps)
      if (step.start + std::ssize(step.tokens) > 70 && step.tokens.back() == 0)
        throw std::runtime_error("bad token");
  };
  const auto failing = world.add(plain(bad, 1));
  const Request request = plain(behind(counting(70), 2, 5), 2);
  const auto other = world.add(request);
  world.run_to_end();
  log::set_level(log::Level::kInfo);
  EXPECT_EQ(failing->answers[0].finish, FinishReason::kError);
  EXPECT_EQ(other->answers[0], world.expected(request));
}

TEST(SharedPrompts, WhoWantsNoSharingOrComesFirstDoesNotWait) {
  const auto rows = [](auto&& change) {
    Counting counted(roomy());
    Request first = plain(counting(60), 1), second = first;
    change(first, second);
    const auto a = counted.world.add(first), b = counted.world.add(second);
    counted.world.run_to_end();
    EXPECT_EQ(a->answers[0], counted.world.expected(first));
    EXPECT_EQ(b->answers[0], counted.world.expected(second));
    return counted.rows;
  };
  EXPECT_EQ(rows([](Request&, Request&) {}), 61);
  EXPECT_EQ(rows([](Request&, Request& second) { second.use_prefix_cache = false; }), 120);
  EXPECT_EQ(rows([](Request&, Request& second) { second.prompt_logprobs = 1; }), 120);
  EXPECT_EQ(rows([](Request& first, Request& second) {
              first.prompt_logprobs = 0;
              second.prompt_logprobs = 1;
            }),
            120);
  EXPECT_EQ(rows([](Request& first, Request& second) {
              first.prompt.resize(31);
              second.prompt.resize(31);
            }),
            62)
      << "too little to wait for";
}

}  // namespace
}  // namespace hadal::engine_core
