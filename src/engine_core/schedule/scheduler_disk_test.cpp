// Prefixes that come from the disk store and go there.
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "base/log.h"
#include "testing/scheduler_world.h"

namespace hadal::engine_core {
namespace {

using testing::scripted::Config;
using testing::scripted::counting;
using testing::scripted::plain;
using testing::scripted::Recorder;
using testing::scripted::Tokens;
using testing::scripted::World;

TEST(Scheduler, EveryPageBoundaryResumesFromAStoreOfAllWindows) {
  for (const int64_t window : {3, 10}) {
    Config config;
    config.model.window = window;
    config.model.whole_windows = true;
    config.store = true;
    config.policy = WindowPolicy::kFull;
    config.scheduler.cache.snapshot_interval = 16;
    config.scheduler.max_drafts = 3;
    World world(config);
    Tokens text = counting(30);
    auto first = world.add(plain(text, 20));
    world.run_to_end();
    const Tokens& answer = first->answers[0].tokens;
    text.insert(text.end(), answer.begin(), answer.end() - 1);
    for (int64_t shared = 1; shared <= std::ssize(text); ++shared) {
      world.scheduler.clear_prefix_tree();
      Tokens prompt(text.begin(), text.begin() + shared);
      prompt.push_back(31);
      const Request request = plain(prompt, 2);
      auto sink = world.add(request);
      world.run_to_end();
      EXPECT_EQ(sink->cache.disk_tokens, shared / 4 * 4);
      EXPECT_EQ(sink->answers[0], world.expected(request));
    }
  }
}

// A world whose store, not its memory, holds the prompt of 400 tokens.
struct LoadingWorld : World {
  static Config config() {
    Config config;
    config.model.num_pages = 500;
    config.max_context = 700;
    config.store = true;
    config.scheduler.load_pages = 3;
    return config;
  }
  LoadingWorld() : World(config()) {
    add(long_one);
    Request other = long_one;
    other.prompt[0] = 30;
    add(other);
    run_to_end();
    scheduler.clear_prefix_tree();
  }
  Request long_one = plain(counting(401, 2), 3);
};

TEST(Scheduler, RunningAnswersKeepTheirPaceWhileALongPrefixIsLoaded) {
  LoadingWorld world;
  const Request request = plain(counting(3), 150);
  auto answer = world.add(request);
  for (int i = 0; i < 4; ++i) world.scheduler.step();
  auto loading = world.add(world.long_one);
  // Another that shares no page with it.
  Request other = world.long_one;
  other.prompt[0] = 30;
  world.add(other);
  int64_t steps = 0;
  for (; loading->finished == 0; ++steps) {
    const size_t before = answer->answers[0].tokens.size();
    ASSERT_TRUE(world.scheduler.step());
    ASSERT_NO_THROW(world.scheduler.check_integrity());
    ASSERT_EQ(answer->answers[0].tokens.size(), before + 1);
  }
  EXPECT_GE(steps, 400 / 4 * 2 / 3 - 1) << "two of them share three pages a step";
  EXPECT_LE(world.store.most_read, 3);
  EXPECT_EQ(loading->cache.disk_tokens, 400);
  EXPECT_EQ(loading->cache.cached_tokens, 400);
  EXPECT_GE(world.scheduler.stats().disk_bytes, 100 * world.model.page_bytes());
  world.run_to_end();
  EXPECT_EQ(world.scheduler.stats().disk_tokens, 800);
  EXPECT_EQ(answer->answers[0], world.expected(request));
  EXPECT_EQ(loading->answers[0], world.expected(world.long_one));
}

TEST(Scheduler, OneLoadServesAllThatBeginAlike) {
  for (const bool cancel : {false, true}) {
    LoadingWorld world;
    world.store.num_read = 0;
    std::vector<std::shared_ptr<Recorder>> sinks;
    for (int i = 0; i < 3; ++i) sinks.push_back(world.add(world.long_one));
    const Request brief = plain(counting(30, 2), 3);
    auto shorter = world.add(brief);
    for (int i = 0; i < 10; ++i) {
      world.scheduler.step();
      ASSERT_NO_THROW(world.scheduler.check_integrity());
    }
    if (cancel) world.scheduler.cancel(world.last_id - 3);
    world.run_to_end();
    EXPECT_GE(world.store.num_read, 100);
    EXPECT_LE(world.store.num_read, 130) << "of a hundred pages";
    for (size_t i = cancel ? 1 : 0; i < sinks.size(); ++i) {
      EXPECT_EQ(sinks[i]->answers[0], world.expected(world.long_one));
      EXPECT_EQ(sinks[i]->cache.cached_tokens, 400);
    }
    EXPECT_EQ(shorter->answers[0], world.expected(brief));
    EXPECT_EQ(shorter->cache.disk_tokens, 28) << "it does not wait for the long one";
  }
}

TEST(Scheduler, StatesAreComputedAgainAPageAtATime) {
  Config config;
  config.model.window = 30;
  config.store = true;
  config.policy = WindowPolicy::kZero;
  World world(config);
  const Request request = plain(counting(90), 5);
  world.add(request);
  world.run_to_end();
  world.scheduler.clear_prefix_tree();
  const Request other = plain(counting(3, 7), 40);
  auto answer = world.add(other);
  world.scheduler.step();
  auto loading = world.add(request);
  int64_t steps = 0;
  for (; loading->finished == 0; ++steps) {
    const size_t before = answer->answers[0].tokens.size();
    ASSERT_TRUE(world.scheduler.step());
    ASSERT_EQ(answer->answers[0].tokens.size(), before + 1);
  }
  EXPECT_GE(steps, 30 / 4);
  EXPECT_EQ(world.model.most_rebuilt, 4);
  EXPECT_EQ(loading->cache.disk_tokens, 88);
  EXPECT_EQ(loading->answers[0], world.expected(request));
  world.run_to_end();
  EXPECT_EQ(answer->answers[0], world.expected(other));
}

TEST(Scheduler, ALoadEndsAtADamagedPageWithACancelAndWithoutTheStore) {
  LoadingWorld world;
  // The page for positions 240 to 243 cannot be read.
  world.store.damaged_page = 60;
  auto damaged = world.add(world.long_one);
  world.run_to_end();
  EXPECT_EQ(damaged->cache.disk_tokens, 240);
  EXPECT_EQ(damaged->answers[0], world.expected(world.long_one));
  world.store.damaged_page = -1;
  world.scheduler.clear_prefix_tree();

  auto cancelled = world.add(world.long_one);
  for (int i = 0; i < 5; ++i) world.scheduler.step();
  EXPECT_EQ(world.scheduler.stats().running, 1);
  world.scheduler.cancel(world.last_id);
  EXPECT_EQ(cancelled->answers[0].finish, FinishReason::kCancelled);
  EXPECT_EQ(world.scheduler.stats().pages_free, world.scheduler.stats().pages_total);

  log::set_level(log::Level::kError);
  auto alone = world.add(world.long_one);
  for (int i = 0; i < 5; ++i) world.scheduler.step();
  world.store.throws = true;
  world.run_to_end();
  EXPECT_EQ(alone->cache.disk_tokens, 0);
  EXPECT_STREQ(alone->cache.miss, "disk error");
  EXPECT_EQ(alone->answers[0], world.expected(world.long_one));
  log::set_level(log::Level::kInfo);
}

TEST(Scheduler, PagesThatTheStoreRefusedAreOfferedAgain) {
  Config config;
  config.store = true;
  World world(config);
  world.store.refuses = true;
  Request request = plain(counting(90), 2);
  world.add(request);
  world.run_to_end();
  const auto from_disk = [&] {
    world.scheduler.clear_prefix_tree();
    auto sink = world.add(request);
    world.run_to_end();
    EXPECT_EQ(sink->answers[0], world.expected(request));
    return sink->cache.disk_tokens;
  };
  EXPECT_EQ(from_disk(), 0);
  world.store.refuses = false;
  // A few pages at a time.
  for (int uses = 0; uses < 3; ++uses) {
    world.add(request);
    world.run_to_end();
  }
  EXPECT_EQ(from_disk(), 88);
}

}  // namespace
}  // namespace hadal::engine_core
