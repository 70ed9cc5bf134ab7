#include "engine_core/schedule/serving_loop.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/philox.h"
#include "testing/scripted_model.h"

namespace hadal::engine_core {
namespace {

using testing::ScriptedFilters;
using testing::ScriptedModel;

using Tokens = std::vector<int64_t>;

class Waiting : public Sink {
 public:
  explicit Waiting(int64_t choices) : open_(choices), tokens_(static_cast<size_t>(choices)) {}
  void on_update(Update update) override {
    const std::lock_guard lock(mutex_);
    for (const OutputToken& token : update.tokens) {
      tokens_[static_cast<size_t>(update.choice)].push_back(token.token);
    }
    if (update.weights != nullptr) version_ = update.weights->number;
    if (!update.finish) return;
    reason_ = *update.finish;
    if (--open_ == 0) done_.notify_all();
  }
  FinishReason wait() {
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return open_ == 0; });
    return reason_;
  }
  int64_t version() {
    const std::lock_guard lock(mutex_);
    return version_;
  }
  Tokens tokens(int64_t choice) {
    const std::lock_guard lock(mutex_);
    return tokens_[static_cast<size_t>(choice)];
  }

 private:
  std::mutex mutex_;
  std::condition_variable done_;
  int64_t open_, version_ = -1;
  FinishReason reason_ = FinishReason::kError;
  std::vector<Tokens> tokens_;
};

struct World {
  explicit World(const SchedulerOptions& options)
      : model({.num_pages = 48, .num_slots = 6}),
        loop({.model_name = "scripted",
              .vocab_size = 32,
              .max_context = 100,
              .max_choices = 4,
              .eos_token = 0},
             options,
             {.runner = model, .memory = model, .filters = filters}) {}

  ScriptedModel model;
  ScriptedFilters filters;
  ServingLoop loop;
};

Request greedy(Tokens prompt, int64_t max_tokens) {
  Request request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  request.ignore_eos = true;
  request.sampling.temperature = 0;
  return request;
}

TEST(ServingLoop, ManyThreadsGetTheirAnswers) {
  World world({.step_tokens = 16});
  const ScriptedModel reference({});
  std::atomic<int64_t> answers = 0, cancelled = 0;
  const auto client = [&](uint64_t number) {
    const Philox random(number, 3);
    for (uint64_t i = 0; i < 40; ++i) {
      const auto draw = random.block(i);
      Tokens prompt;
      for (uint32_t t = 0; t < 2 + draw[0] % 30; ++t) prompt.push_back(1 + t % 3 + draw[1] % 2);
      Request request = greedy(prompt, 1 + draw[2] % 20);
      request.n = 1 + draw[3] % 2;
      auto sink = std::make_shared<Waiting>(request.n);
      uint64_t id = 0;
      ASSERT_EQ(world.loop.submit(request, sink, &id), Submitted::kAccepted);
      if (i % 5 == 0) world.loop.cancel(id);
      EXPECT_GE(world.loop.stats().steps, 0);
      if (sink->wait() == FinishReason::kCancelled) {
        ++cancelled;
        continue;
      }
      for (int64_t choice = 0; choice < request.n; ++choice) {
        Tokens all = prompt;
        for (const int64_t token : sink->tokens(choice)) {
          const std::vector<float> logits = reference.reference(all);
          ASSERT_EQ(token, std::ranges::max_element(logits) - logits.begin());
          all.push_back(token);
        }
        ++answers;
      }
    }
  };
  std::vector<std::thread> threads;
  for (uint64_t i = 0; i < 4; ++i) threads.emplace_back(client, i);
  for (std::thread& thread : threads) thread.join();
  world.loop.drain();
  EXPECT_GT(answers, 100);
  const EngineStats stats = world.loop.stats();
  EXPECT_EQ(stats.finished + stats.cancelled, 160);
  EXPECT_EQ(stats.running + stats.waiting, 0);
  EXPECT_EQ(stats.state_slots_free, stats.state_slots_total);
  EXPECT_GT(stats.overhead_seconds, 0);
  EXPECT_FALSE(world.loop.integrity_lost());
  uint64_t id = 0;
  EXPECT_EQ(world.loop.submit(greedy({1}, 1), std::make_shared<Waiting>(1), &id),
            Submitted::kStopping);
}

// Holds the model inside a step until opened.
class Gate {
 public:
  void pass() {
    std::unique_lock lock(mutex_);
    reached_ = true;
    changed_.notify_all();
    changed_.wait(lock, [this] { return open_; });
  }
  void wait_until_reached() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return reached_; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool open_ = false, reached_ = false;
};

TEST(ServingLoop, AFullQueueRefusesAndCancelTakesOneStep) {
  SchedulerOptions options;
  options.max_waiting = 2;
  options.max_running = 1;
  World world(options);
  Gate gate;
  std::atomic<int64_t> steps = 0;
  world.model.on_run = [&](std::span<const SequenceStep>) {
    ++steps;
    gate.pass();
  };
  auto running = std::make_shared<Waiting>(1);
  uint64_t id = 0, other = 0;
  ASSERT_EQ(world.loop.submit(greedy({1, 2}, 90), running, &id), Submitted::kAccepted);
  gate.wait_until_reached();
  std::vector<std::shared_ptr<Waiting>> waiting;
  int64_t accepted = 0;
  for (int i = 0; i < 5; ++i) {
    auto sink = std::make_shared<Waiting>(1);
    const Submitted answer = world.loop.submit(greedy({3, 4}, 2), sink, &other);
    if (answer == Submitted::kQueueFull) continue;
    ++accepted;
    waiting.push_back(sink);
  }
  // The running one may still count as waiting: the numbers are those after the last step.
  EXPECT_GE(accepted, 1);
  EXPECT_LE(accepted, 2);
  const int64_t before = steps;
  world.loop.cancel(id);
  gate.open();
  EXPECT_EQ(running->wait(), FinishReason::kCancelled);
  EXPECT_LE(running->tokens(0).size(), 1u);
  EXPECT_GE(steps, before);
  for (const auto& sink : waiting) EXPECT_EQ(sink->wait(), FinishReason::kLength);
}

// Throws at its second update, or holds every one up.
class Troublesome : public Sink {
 public:
  explicit Troublesome(Gate* gate) : gate_(gate) {}
  void on_update(Update update) override {
    ++updates;
    finished = finished || update.finish.has_value();
    if (gate_ != nullptr) return gate_->pass();
    if (updates == 2) throw Error("the client's fault");
  }
  std::atomic<int64_t> updates = 0;
  std::atomic<bool> finished = false;

 private:
  Gate* gate_;
};

TEST(ServingLoop, ASinkThatThrowsEndsItsRequestAlone) {
  World world({});
  auto troublesome = std::make_shared<Troublesome>(nullptr);
  auto other = std::make_shared<Waiting>(1);
  // As slow as a model, or all would be drawn before anything has been delivered.
  world.model.on_run = [](std::span<const SequenceStep>) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  };
  uint64_t id = 0;
  ASSERT_EQ(world.loop.submit(greedy({1, 2}, 90), troublesome, &id), Submitted::kAccepted);
  ASSERT_EQ(world.loop.submit(greedy({1, 2}, 97), other, &id), Submitted::kAccepted);
  EXPECT_EQ(other->wait(), FinishReason::kLength);
  world.loop.drain();
  EXPECT_EQ(troublesome->updates, 2);
  EXPECT_FALSE(troublesome->finished);
  const EngineStats stats = world.loop.stats();
  EXPECT_EQ(stats.finished, 1);
  EXPECT_EQ(stats.finished + stats.cancelled + stats.failed, 2);
}

TEST(ServingLoop, ASlowSinkDoesNotHoldUpTheEngine) {
  World world({});
  Gate gate;
  auto slow = std::make_shared<Troublesome>(&gate);
  uint64_t id = 0;
  ASSERT_EQ(world.loop.submit(greedy({1, 2}, 90), slow, &id), Submitted::kAccepted);
  gate.wait_until_reached();
  while (world.loop.stats().finished == 0) std::this_thread::yield();
  EXPECT_EQ(slow->updates, 1);
  // Idle, the engine still takes what comes.
  auto other = std::make_shared<Waiting>(1);
  ASSERT_EQ(world.loop.submit(greedy({3, 4}, 2), other, &id), Submitted::kAccepted);
  while (world.loop.stats().finished == 1) std::this_thread::yield();
  gate.open();
  world.loop.drain();
  EXPECT_EQ(other->wait(), FinishReason::kLength);
  EXPECT_EQ(slow->updates, 90);
  EXPECT_TRUE(slow->finished);
}

TEST(ServingLoop, NewWeightsComeBetweenRequests) {
  World world({});
  Gate gate;
  world.model.on_run = [&](std::span<const SequenceStep>) { gate.pass(); };
  auto begun = std::make_shared<Waiting>(1), later = std::make_shared<Waiting>(1);
  uint64_t id = 0;
  ASSERT_EQ(world.loop.submit(greedy({1, 2}, 9), begun, &id), Submitted::kAccepted);
  gate.wait_until_reached();
  const auto swap_to = [&](int64_t version) {
    world.loop.update_weights({.version = {.number = version, .digest = {}}, .swap = [&, version] {
                                 world.model.weights = static_cast<uint64_t>(version);
                               }});
  };
  std::thread updates([&] {
    swap_to(1);
    swap_to(2);
  });
  ASSERT_EQ(world.loop.submit(greedy({1, 2}, 9), later, &id), Submitted::kAccepted);
  gate.open();
  begun->wait();
  later->wait();
  updates.join();
  EXPECT_EQ(begun->version(), 0);
  EXPECT_GE(later->version(), 0);
  for (const auto& sink : {begun, later}) {
    ScriptedModel alone({});
    alone.weights = static_cast<uint64_t>(sink->version());
    Tokens all = {1, 2};
    for (const int64_t token : sink->tokens(0)) {
      const std::vector<float> logits = alone.reference(all);
      ASSERT_EQ(token, std::ranges::max_element(logits) - logits.begin());
      all.push_back(token);
    }
  }
  // When nothing runs, at once.
  swap_to(3);
  auto last = std::make_shared<Waiting>(1);
  ASSERT_EQ(world.loop.submit(greedy({1, 2}, 2), last, &id), Submitted::kAccepted);
  last->wait();
  EXPECT_EQ(last->version(), 3);
  EXPECT_THROW(swap_to(3), InputError);
  world.loop.drain();
  EXPECT_FALSE(world.loop.integrity_lost());
}

TEST(ServingLoop, EndsWithItsRequestsCancelled) {
  auto sink = std::make_shared<Waiting>(2);
  {
    World world({});
    Request request = greedy({1, 2, 3}, 90);
    request.n = 2;
    uint64_t id = 0;
    ASSERT_EQ(world.loop.submit(request, sink, &id), Submitted::kAccepted);
    EXPECT_THROW(world.loop.submit(greedy({}, 1), sink, &id), InputError);
  }
  const FinishReason reason = sink->wait();
  EXPECT_TRUE(reason == FinishReason::kCancelled || reason == FinishReason::kLength);
  EXPECT_EQ(sink.use_count(), 1) << "the engine let go of it";
}

}  // namespace
}  // namespace hadal::engine_core
