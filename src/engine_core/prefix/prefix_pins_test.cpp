// Keys that hold prefixes: what they keep, what they cannot take from others, when they let go.
#include <cstdio>

#include "engine_core/prefix/prefix_tree.h"
#include "testing/cache_traffic.h"

namespace hadal::engine_core {
namespace {

using testing::traffic::Counts;
using testing::traffic::kNano;
using testing::traffic::Served;
using testing::traffic::Talk;
using testing::traffic::Tokens;
using testing::traffic::Traffic;
using testing::traffic::Turn;
using testing::traffic::Writer;

using Clock = PrefixPins::Clock;

constexpr int64_t kSlots = 8;

SchedulerOptions options() {
  SchedulerOptions options;
  options.max_running = kSlots;
  return options;
}

int64_t pages_of(int64_t mib) {
  return ((mib << 20) - kSlots * kNano.state_bytes) / kNano.page_bytes;
}

/// Conversations of one turn each, which nobody goes on with.
Traffic strangers(int64_t count, int64_t size, uint64_t seed, const std::string& key = "") {
  Writer writer(seed);
  Traffic all;
  for (int64_t i = 0; i < count; ++i) {
    Talk talk;
    talk.number = 1000 + i;
    Turn turn = talk.next(writer, size, 60);
    if (!key.empty()) turn.key.name = key + std::to_string(i);
    turn.key.client = key;
    all.push_back({std::move(turn)});
  }
  return all;
}

/// A second turn after many strangers'.
struct Keyed {
  std::vector<Talk> talks;
  Writer writer{7};
  explicit Keyed(int64_t count) : talks(static_cast<size_t>(count)) {
    for (int64_t i = 0; i < count; ++i) talks[static_cast<size_t>(i)].number = i;
  }
  Traffic turn(int64_t question, bool keys) {
    Traffic all;
    for (Talk& talk : talks) {
      Turn turn = talk.next(writer, question, 60);
      if (keys) turn.key.name = "talk " + std::to_string(talk.number);
      all.push_back({std::move(turn)});
    }
    return all;
  }
};

Counts after_strangers(bool keys) {
  Served served(kNano, pages_of(32), kSlots, options());
  Keyed keyed(6);
  served.run(keyed.turn(4000, keys));
  served.run(strangers(100, 3000, 3));
  return served.run(keyed.turn(100, keys));
}

TEST(PrefixPins, KeyedConversationsOutliveTrafficWithoutKeys) {
  const Counts with = after_strangers(true), without = after_strangers(false);
  EXPECT_EQ(with.cached, 6 * (4000 + 60 - 1)) << "all but the new turn and the last token drawn";
  EXPECT_EQ(without.cached, 0);
}

// Those that begin alike hold their beginning, too, once it was used twice.
TEST(PrefixPins, AKeyHoldsTheBeginningThatItsRequestsShare) {
  Served served(kNano, pages_of(32), kSlots, options());
  Writer writer(5);
  const Tokens beginning = writer.draw(1024);
  const auto ask = [&](int64_t number) {
    Talk talk;
    talk.number = number;
    talk.tokens = beginning;
    Turn turn = talk.next(writer, 50, 10);
    turn.key.name = "app";
    return served.run(std::vector<Turn>{turn}).front().cached_tokens;
  };
  EXPECT_EQ(ask(1), 0);
  EXPECT_EQ(ask(2), 1024);
  EXPECT_EQ(ask(3), 1024);
  served.run(strangers(100, 3000, 3));
  EXPECT_EQ(ask(4), 1024);
}

// The others keep at least half of the cache: a flood of keys takes no more from them than the same
// traffic without keys would in a cache of half the size.
TEST(PrefixPins, AFloodOfKeysDoesNotStarveTheRest) {
  const auto rest = [](int64_t pages, const std::string& keys) {
    Served served(kNano, pages, kSlots, options());
    Keyed others(12);
    Counts counts;
    served.run(others.turn(1500, false));
    for (uint64_t round = 0; round < 6; ++round) {
      served.run(strangers(12, 3000, 100 + round, keys));
      const Counts more = served.run(others.turn(150, false));
      counts.prompt += more.prompt;
      counts.cached += more.cached;
    }
    served.scheduler().check_integrity();
    const EngineStats stats = served.scheduler().stats();
    EXPECT_EQ(stats.pinned_keys > 0, !keys.empty());
    EXPECT_LE(stats.pinned_pages, stats.pages_total / 2);
    return counts.cached;
  };
  for (const int64_t mib : {32, 48, 64, 96}) {
    const int64_t pages = pages_of(mib);
    const int64_t all = rest(pages, ""), half = rest(pages / 2, ""), flooded = rest(pages, "flood");
    std::printf(
        "%lld MiB: beside as much traffic without keys %lld tokens come again, beside keys "
        "%lld, in half the cache %lld\n",
        static_cast<long long>(mib), static_cast<long long>(all), static_cast<long long>(flooded),
        static_cast<long long>(half));
    EXPECT_GE(flooded, half * 95 / 100) << mib;
  }
}

// A client that holds the most gives up its own keys first.
TEST(PrefixPins, AFloodOfKeysTakesNoOtherClientsKey) {
  Served served(kNano, pages_of(48), kSlots, options());
  Keyed mine(3);
  served.run(mine.turn(2000, true));
  served.run(strangers(60, 3000, 9, "flood"));
  EXPECT_EQ(served.run(mine.turn(100, true)).cached, 3 * (2000 + 60 - 1));
}

class PinnedTree : public ::testing::Test {
 protected:
  // A state of one page behind so many tokens of one value.
  void add(int64_t value, const CacheKey* key = nullptr, Clock::time_point now = {}) {
    const Tokens tokens(4, value);
    Tokens pages = {allocate()};
    tree.insert(tokens, pages);
    if (tree.make_room(tokens, StateKind::kEnd, 1, key != nullptr)) {
      const Tokens snapshot = {allocate()};
      tree.keep_state(tokens, pages, snapshot, StateKind::kEnd);
    }
    for (const int64_t page : pages) pool.release(page);
    if (key != nullptr) tree.pin(*key, tokens, Pin::kEnd, now);
    std::vector<int64_t> expected(static_cast<size_t>(pool.num_pages()));
    tree.check_integrity(expected);
  }
  int64_t allocate() {
    while (pool.num_free() == 0) EXPECT_TRUE(tree.evict());
    return pool.allocate().value();
  }
  bool has(int64_t value) const { return tree.has_state(Tokens(4, value)); }
  void evict(int64_t count) {
    for (int64_t i = 0; i < count; ++i) ASSERT_TRUE(tree.evict());
  }

  PagePool pool{24};
  PrefixTree tree{4, pool};
};

TEST_F(PinnedTree, WhatAKeyHoldsGoesLast) {
  const CacheKey key{.name = "a", .client = ""};
  add(1, &key, Clock::time_point());
  for (int64_t value = 2; value < 8; ++value) add(value);
  evict(6);
  EXPECT_TRUE(has(1));
  EXPECT_EQ(tree.pins().num_pages(), 2);
  EXPECT_TRUE(tree.evict()) << "nothing else is left: running answers come first";
  EXPECT_FALSE(has(1));
  EXPECT_EQ(tree.pins().num_keys(), 0);
}

TEST_F(PinnedTree, AKeyHoldsItsLastPrefixAlone) {
  const CacheKey key{.name = "a", .client = ""};
  add(1, &key);
  add(2, &key);
  add(3);
  EXPECT_EQ(tree.pins().num_pages(), 2);
  evict(2);
  EXPECT_FALSE(has(1));
  EXPECT_TRUE(has(2));
}

TEST_F(PinnedTree, AnUnusedKeyLetsGoAfterItsTime) {
  using std::chrono::seconds;
  const CacheKey brief{.name = "brief", .client = "", .retention = seconds(300)};
  const CacheKey daily{.name = "daily", .client = "", .retention = seconds(86'400)};
  const Clock::time_point start;
  add(1, &brief, start);
  add(2, &daily, start);
  tree.expire_pins(start + seconds(299));
  EXPECT_EQ(tree.pins().num_keys(), 2);
  tree.pin(brief, Tokens(4, 1), Pin::kEnd, start + seconds(299));
  tree.expire_pins(start + seconds(301));
  EXPECT_EQ(tree.pins().num_keys(), 2) << "it was used";
  tree.expire_pins(start + seconds(599));
  EXPECT_EQ(tree.pins().num_keys(), 1);
  evict(1);
  EXPECT_FALSE(has(1));
  EXPECT_TRUE(has(2));
}

TEST_F(PinnedTree, TwoClientsWithOneNameHaveTwoKeys) {
  const CacheKey mine{.name = "a", .client = "me"}, yours{.name = "a", .client = "you"};
  add(1, &mine);
  add(2, &yours);
  add(3);
  evict(1);
  EXPECT_TRUE(has(1) && has(2));
  EXPECT_FALSE(has(3));
}

}  // namespace
}  // namespace hadal::engine_core
