#include "engine_core/prefix/sequence_cache.h"

#include <algorithm>
#include <memory>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "base/log.h"
#include "base/philox.h"
#include "testing/scripted_model.h"

namespace hadal::engine_core {
namespace {

using testing::ScriptedModel;
using testing::ScriptedOptions;
using testing::ScriptedStore;

using Tokens = std::vector<int64_t>;

// Sanitizers make everything slow: they check less often.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kCheckEvery = 16;
#else
constexpr int kCheckEvery = 1;
#endif

// Random sequences over one cache, each step compared with the model without caches.
class World {
 public:
  World(const ScriptedOptions& model_options,
        const SequenceCache::Options& options,
        PrefixStore* store,
        uint64_t seed)
      : model(model_options), cache(model, model, options, store), random_(seed, 7) {}

  struct Live {
    Tokens tokens;  ///< all but the last computed
    CachedSequence cache;
  };

  int64_t draw(int64_t below) {
    return static_cast<int64_t>(random_.block(counter_++)[0] % static_cast<uint64_t>(below));
  }

  // Computes `count` tokens of a sequence; the logits of the last must be the reference's.
  void compute(Live& live, int64_t count) {
    if (!cache.reserve(live.cache, live.cache.pos + count)) return;
    const auto pos = static_cast<size_t>(live.cache.pos);
    const SequenceStep step = {
        .slot = live.cache.slot,
        .start = live.cache.pos,
        .tokens = std::span<const int64_t>(live.tokens).subspan(pos, static_cast<size_t>(count)),
        .pages = std::span<const int64_t>(live.cache.pages)
                     .first(static_cast<size_t>(cache.num_pages_for(live.cache.pos + count))),
        .num_logits = 1,
        .shows_logits = true};
    model.run({&step, 1});
    live.cache.pos += count;
    const Tokens computed(live.tokens.begin(), live.tokens.begin() + live.cache.pos);
    const std::span<const float> got = model.logits(0, 0);
    ASSERT_TRUE(std::ranges::equal(got, model.reference(computed)))
        << "other logits after " << live.cache.pos << " tokens";
  }

  void admit() {
    Live live;
    if (!history.empty() && draw(4) > 0) {
      live.tokens = history[static_cast<size_t>(draw(static_cast<int64_t>(history.size())))];
      live.tokens.resize(static_cast<size_t>(draw(static_cast<int64_t>(live.tokens.size())) + 1));
    }
    for (int64_t more = draw(7) + 1; more > 0; --more) live.tokens.push_back(draw(3));
    const bool use_tree = draw(8) > 0;
    const PrefixMatch match = cache.match(live.tokens, use_tree);
    SequenceCache::Opened opened;
    if (!cache.open(live.tokens, match, use_tree, live.cache, opened)) return;
    ASSERT_EQ(opened.cached_tokens, live.cache.pos);
    hits += live.cache.pos > 0 ? 1 : 0;
    lives.push_back(std::make_unique<Live>(std::move(live)));
  }

  void append(Live& live) {
    const auto left = static_cast<int64_t>(live.tokens.size()) - live.cache.pos;
    if (cache.loads(live.cache)) {
      SequenceCache::Opened opened;
      cache.load(live.cache, live.tokens, draw(3) + 1, opened);
      ASSERT_TRUE(opened.cached_tokens == 0 || opened.cached_tokens == live.cache.pos);
      return;
    }
    if (left == 0) {
      live.tokens.push_back(draw(3));
      return;
    }
    const int64_t boundary = cache.next_kept(live.cache.pos) - live.cache.pos;
    compute(live, std::min(boundary, draw(left) + 1));
    cache.store_window(live.cache, live.tokens);
    if (live.cache.pos % cache.snapshot_interval() == 0)
      cache.publish(live.cache, live.tokens, StateKind::kPage);
  }

  void end(size_t index, bool keep) {
    Live& live = *lives[index];
    if (keep) cache.publish(live.cache, live.tokens, StateKind::kEnd);
    history.push_back(live.tokens);
    if (history.size() > 40) history.erase(history.begin());
    cache.close(live.cache);
    lives.erase(lives.begin() + static_cast<std::ptrdiff_t>(index));
  }

  void operate() {
    const int64_t what = draw(20);
    const auto count = static_cast<int64_t>(lives.size());
    if (count == 0 || what < 3) {
      admit();
      return;
    }
    const auto index = static_cast<size_t>(draw(count));
    if (what < 14) {
      append(*lives[index]);
    } else if (what < 16 && lives[index]->cache.pos > 0 && !cache.loads(lives[index]->cache)) {
      std::optional<CachedSequence> other = cache.fork(lives[index]->cache);
      if (!other) return;
      auto live = std::make_unique<Live>(*lives[index]);
      live->cache = std::move(*other);
      lives.push_back(std::move(live));
    } else if (what < 17) {
      end(index, false);
    } else if (what < 19) {
      end(index, true);
    } else if (draw(50) == 0) {
      cache.clear_tree();
    }
  }

  // The pools' bytes are those of the pages somebody holds, counted by hand.
  void check() {
    std::vector<const CachedSequence*> open;
    for (const std::unique_ptr<Live>& live : lives) open.push_back(&live->cache);
    ASSERT_NO_THROW(cache.check_integrity(open));
    std::set<int64_t> held;
    for (const CachedSequence* sequence : open) {
      held.insert(sequence->pages.begin(), sequence->pages.end());
      held.insert(sequence->loaded.begin(), sequence->loaded.end());
      const int64_t least = cache.num_pages_for(sequence->pos);
      ASSERT_GE(static_cast<int64_t>(sequence->pages.size()), least);
    }
    const int64_t pages = static_cast<int64_t>(held.size()) + cache.pages().num_cached();
    ASSERT_EQ(cache.bytes_in_use(),
              pages * model.page_bytes() + static_cast<int64_t>(open.size()) * model.state_bytes());
  }

  ScriptedModel model;
  SequenceCache cache;
  std::vector<std::unique_ptr<Live>> lives;
  std::vector<Tokens> history;
  int64_t hits = 0;

 private:
  Philox random_;
  uint64_t counter_ = 0;
};

void expect_no_leak(World& world) {
  while (!world.lives.empty()) world.end(0, true);
  world.check();
  world.cache.clear_tree();
  world.check();
  EXPECT_EQ(world.cache.bytes_in_use(), 0);
}

TEST(SequenceCache, HundredThousandRandomOperations) {
  World world({.page_tokens = 4, .num_pages = 40, .num_slots = 6, .slack = 0},
              {.snapshot_interval = 8}, nullptr, 11);
  for (int i = 0; i < 100000; ++i) {
    world.operate();
    if (HasFatalFailure()) return;
    if (i % kCheckEvery == 0) world.check();
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(world.hits, 1000);
  expect_no_leak(world);
}

TEST(SequenceCache, RandomOperationsWithAStore) {
  log::set_level(log::Level::kError);  // hundreds of warnings that are meant
  ScriptedStore store(4);
  World world({.page_tokens = 4, .num_pages = 24, .num_slots = 4, .slack = 0},
              {.snapshot_interval = 0}, &store, 12);
  for (int i = 0; i < 12000; ++i) {
    store.throws = i % 1000 > 950;
    store.truncates = i % 1000 > 900;
    store.forgets_states = i / 1000 % 2 == 1;
    if (i % 3000 == 2999) world.cache.clear_tree();
    world.operate();
    if (HasFatalFailure()) return;
    if (i % kCheckEvery == 0) world.check();
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(world.cache.counters().disk_hits, 50);
  EXPECT_GT(world.cache.counters().disk_misses, 50);
  EXPECT_GT(world.cache.counters().disk_errors, 5);
  expect_no_leak(world);
  log::set_level(log::Level::kInfo);
}

TEST(SequenceCache, RandomOperationsWithAStoreOfAllWindows) {
  log::set_level(log::Level::kError);
  for (const int64_t window : {3, 4, 10}) {  // less than a page, a page, three pages
    ScriptedStore store(4, WindowPolicy::kFull, (window + 3) / 4);
    World world({.page_tokens = 4,
                 .num_pages = 24,
                 .num_slots = 4,
                 .window = window,
                 .slack = 0,
                 .whole_windows = true},
                {.snapshot_interval = 8}, &store, 13);
    for (int i = 0; i < 6000; ++i) {
      store.throws = i % 1000 > 950;
      store.truncates = i % 1000 > 900;
      if (i % 1500 == 1499) world.cache.clear_tree();
      world.operate();
      if (HasFatalFailure()) return;
      if (i % kCheckEvery == 0) world.check();
      if (HasFatalFailure()) return;
    }
    EXPECT_GT(world.cache.counters().disk_hits, 50);
    EXPECT_GT(world.cache.counters().disk_misses, 50);
    expect_no_leak(world);
  }
  log::set_level(log::Level::kInfo);
}

TEST(SequenceCache, RecomputesLessThanAnIntervalOfASharedPrefix) {
  World world({.page_tokens = 4, .num_pages = 64, .num_slots = 2, .slack = 0},
              {.snapshot_interval = 8}, nullptr, 1);
  Tokens tokens;
  for (int64_t i = 0; i < 60; ++i) tokens.push_back(i % 7);
  World::Live live{.tokens = tokens, .cache = {}};
  SequenceCache::Opened opened;
  ASSERT_TRUE(world.cache.open(tokens, world.cache.match(tokens, true), true, live.cache, opened));
  while (live.cache.pos < 60) world.append(live);
  world.cache.close(live.cache);
  for (int64_t shared = 0; shared < 60; ++shared) {
    Tokens other(tokens.begin(), tokens.begin() + shared);
    other.push_back(20);
    EXPECT_EQ(world.cache.match(other, true).pos, shared / 8 * 8);
  }
  EXPECT_STREQ(world.cache.match(tokens, false).miss, "off");
}

TEST(SequenceCache, ALoneSequenceTakesOverItsTail) {
  World world({.page_tokens = 4, .num_pages = 3, .num_slots = 1, .slack = 0}, {}, nullptr, 1);
  World::Live live{.tokens = {1, 2, 3, 4, 5, 6, 7}, .cache = {}};
  SequenceCache::Opened opened;
  ASSERT_TRUE(world.cache.open(live.tokens, {}, true, live.cache, opened));
  world.compute(live, 4);
  world.compute(live, 2);
  world.cache.publish(live.cache, live.tokens, StateKind::kEnd);
  world.cache.close(live.cache);
  const PrefixMatch match = world.cache.match(live.tokens, true);
  EXPECT_EQ(match.pos, 6);
  ASSERT_TRUE(world.cache.open(live.tokens, match, true, live.cache, opened));
  EXPECT_TRUE(world.cache.reserve(live.cache, 12))
      << "the state's page is free, the tail is its own";
  world.compute(live, 1);
  EXPECT_FALSE(world.cache.reserve(live.cache, 13));
}

}  // namespace
}  // namespace hadal::engine_core
