// Draws as parts of steps: masks that are made while a step runs, rows from which nothing can be
// drawn, log-probabilities, and weights that change between requests.
#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/scheduler_world.h"

namespace hadal::engine_core {
namespace {

using testing::ScriptedModel;
using testing::scripted::Answer;
using testing::scripted::Config;
using testing::scripted::counting;
using testing::scripted::expected_answer;
using testing::scripted::plain;
using testing::scripted::Recorder;
using testing::scripted::Tokens;
using testing::scripted::World;

Request with_grammar(Tokens prompt, int64_t max_tokens) {
  Request request = plain(std::move(prompt), max_tokens);
  request.grammar.kind = Grammar::Kind::kRegex;
  return request;
}

TEST(Scheduler, MasksAreMadeWhileTheStepRuns) {
  World world({});
  int64_t masks = 0, made_before = -1;
  world.filters.on_masks = [&] {
    EXPECT_TRUE(world.model.in_flight());
    ++masks;
    return true;
  };
  world.model.on_launch = [&] { made_before = masks; };
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    for (const SequenceStep& step : steps) EXPECT_EQ(masks - made_before, std::ssize(step.draws));
  };
  const Request request = with_grammar(counting(5), 8);
  const auto sink = world.add(request);
  world.run_to_end();
  EXPECT_EQ(masks, 8);
  world.filters.on_masks = {};
  EXPECT_EQ(sink->answers[0], world.expected(request));
}

// Who draws before it is asked for the tokens must know which draws to leave.
TEST(Scheduler, DrawsSayWhetherAMaskWillCome) {
  World world({});
  int64_t with = 0, without = 0;
  world.model.on_run = [&](std::span<const SequenceStep> steps) {
    for (const SequenceStep& step : steps) {
      for (const Draw& draw : step.draws) {
        EXPECT_EQ(draw.masked_later, !draw.mask.empty());
        ++(draw.masked_later ? with : without);
      }
    }
  };
  world.add(with_grammar(counting(5), 6));
  world.add(plain(counting(4), 6));
  world.run_to_end();
  EXPECT_EQ(with, 6);
  EXPECT_EQ(without, 6);
}

TEST(Scheduler, AMaskThatFailsEndsItsRequestAlone) {
  for (const bool throws : {true, false}) {
    World world({});
    int64_t masks = 0;
    world.filters.on_masks = [&] {
      if (++masks < 4) return true;
      if (throws) throw InputError("masks take too long");
      return false;  // nothing may follow
    };
    const Request request = plain(counting(9, 2), 20), other = plain(counting(5), 20);
    const auto failing = world.add(with_grammar(counting(7), 20));
    const auto first = world.add(request), second = world.add(other);
    world.run_to_end();
    EXPECT_EQ(failing->answers[0].finish, FinishReason::kError);
    EXPECT_EQ(failing->answers[0].tokens.size(), 3u);
    EXPECT_NE(failing->answers[0].error.find(throws ? "masks take too long" : "can be drawn"),
              std::string::npos)
        << failing->answers[0].error;
    EXPECT_EQ(first->answers[0], world.expected(request));
    EXPECT_EQ(second->answers[0], world.expected(other));
    EXPECT_EQ(world.scheduler.stats().preemptions, 0) << "the others' step was repeated";
  }
}

TEST(Scheduler, SampledLogprobsComeWithTheirTokens) {
  struct Logprobs final : Sink {
    void on_update(Update update) override {
      for (const OutputToken& token : update.tokens)
        found.emplace_back(token.logprob, token.sampled_logprob);
    }
    std::vector<std::pair<double, double>> found;
  };
  for (const bool asked : {true, false}) {
    Config config;
    config.scheduler.max_drafts = 3;
    config.scheduler.always_draft = true;
    World world(config);
    Request request = plain(counting(5), 12);
    request.sampled_logprobs = asked;
    auto sink = std::make_shared<Logprobs>();
    world.scheduler.add(1, world.scheduler.prepare(request, sink));
    world.run_to_end();
    ASSERT_EQ(sink->found.size(), 12u);
    for (const auto& [model, sampled] : sink->found) {
      EXPECT_NE(model, 0);
      EXPECT_EQ(sampled, asked ? model / 2 : 0);
    }
    EXPECT_GT(world.scheduler.stats().accepted, 0);
  }
}

// What a version answers, alone.
Answer expected_of(int64_t version, const Request& request) {
  ScriptedModel model({});
  model.weights = static_cast<uint64_t>(version);
  return expected_answer(model, request, 0, 200);
}

TEST(Scheduler, WhoHasBegunEndsOnItsWeightsAndTheOthersGetTheNewOnes) {
  Config config;
  config.scheduler.max_running = 2;
  config.store = true;
  World world(config);
  std::vector<Request> requests;
  std::vector<std::shared_ptr<Recorder>> sinks;
  for (int64_t i = 0; i < 5; ++i) {
    requests.push_back(plain(counting(20 + i), 10));
    sinks.push_back(world.add(requests.back()));
  }
  for (int i = 0; i < 4; ++i) world.scheduler.step();
  world.scheduler.hold_waiting();
  requests.push_back(plain(counting(8), 10));
  sinks.push_back(world.add(requests.back()));
  EXPECT_FALSE(world.scheduler.drained());
  const auto swap_to = [&](int64_t version) {
    return WeightsUpdate{.version = {.number = version, .digest = {}}, .swap = [&world, version] {
                           world.model.weights = static_cast<uint64_t>(version);
                           world.store.set_identity("another");
                         }};
  };
  EXPECT_THROW(world.scheduler.update_weights(swap_to(3)), Error) << "while requests run";
  while (!world.scheduler.drained()) {
    ASSERT_TRUE(world.scheduler.step());
    ASSERT_NO_THROW(world.scheduler.check_integrity());
  }
  // One that waits leaves.
  world.scheduler.cancel(4);
  EXPECT_EQ(sinks[3]->answers[0].finish, FinishReason::kCancelled);
  EXPECT_GT(world.scheduler.stats().pages_cached, 0);
  world.scheduler.update_weights(swap_to(3));
  EXPECT_EQ(world.scheduler.stats().pages_cached, 0);
  world.run_to_end();
  for (size_t i : {0u, 1u, 2u, 4u, 5u}) {
    EXPECT_EQ(sinks[i]->weights, i < 2 ? 0 : 3) << i;
    EXPECT_EQ(sinks[i]->answers[0], expected_of(sinks[i]->weights, requests[i])) << i;
  }
  EXPECT_EQ(sinks[2]->cache.cached_tokens, 0) << "computed by the old weights";
}

TEST(Scheduler, WeightsThatCannotBeSwappedLeaveTheOldOnes) {
  World world({});
  for (const bool old : {true, false}) {
    const Request request = plain(counting(9), 6);
    world.scheduler.hold_waiting();
    const auto sink = world.add(request);
    const WeightsUpdate update{.version = {.number = old ? 0 : 1, .digest = {}},
                               .swap = [] { throw Error("no such file"); }};
    if (old) {
      EXPECT_THROW(world.scheduler.update_weights(update), InputError);
    } else {
      EXPECT_THROW(world.scheduler.update_weights(update), Error);
    }
    world.run_to_end();
    EXPECT_EQ(sink->weights, 0);
    EXPECT_EQ(sink->answers[0], world.expected(request));
  }
}

}  // namespace
}  // namespace hadal::engine_core
