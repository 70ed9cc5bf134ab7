#include "engine_core/prefix/prefix_tree.h"

#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/philox.h"

namespace hadal::engine_core {
namespace {

using Tokens = std::vector<int64_t>;

class PrefixTreeTest : public ::testing::Test {
 protected:
  // Inserts as a sequence would and gives its references back; with a state of so many pages.
  int64_t insert(const Tokens& tokens, int64_t state, StateKind kind = StateKind::kEnd) {
    Tokens pages, snapshot;
    for (size_t i = 0; i < (tokens.size() + 3) / 4; ++i) pages.push_back(allocate());
    const int64_t first_new = tree.insert(tokens, pages);
    if (state > 0 && !tree.has_state(tokens) && tree.make_room(tokens, kind, state)) {
      for (int64_t i = 0; i < state; ++i) snapshot.push_back(allocate());
      tree.keep_state(tokens, pages, snapshot, kind);
    }
    for (const int64_t page : pages) pool.release(page);
    check();
    return first_new;
  }
  int64_t allocate() {
    while (pool.num_free() == 0) EXPECT_TRUE(tree.evict());
    return pool.allocate().value();
  }
  void check() {
    std::vector<int64_t> expected(static_cast<size_t>(pool.num_pages()));
    tree.check_integrity(expected);
    pool.check_integrity(expected);
  }
  PrefixMatch match(const Tokens& tokens) const {
    return tree.match(tokens, static_cast<int64_t>(tokens.size()) - 1);
  }
  int64_t use(const Tokens& tokens) {
    const PrefixMatch found = match(tokens);
    tree.use(found);
    return found.pos;
  }

  PagePool pool{24};
  PrefixTree tree{4, pool};
};

TEST_F(PrefixTreeTest, ResumesAtTheLastSnapshotInsideThePrompt) {
  EXPECT_EQ(insert({1, 2, 3, 4, 5, 6, 7, 8}, 1), 0);
  EXPECT_EQ(match({1, 2, 3, 4, 5, 6, 7, 8, 9}).pos, 8);
  const PrefixMatch whole = match({1, 2, 3, 4, 5, 6, 7, 8});
  EXPECT_EQ(whole.pos, 0) << "the last token has to be computed and its page has no earlier state";
  EXPECT_EQ(whole.pages.size(), 2u);
  EXPECT_STREQ(whole.miss, "tail");
  EXPECT_EQ(insert({1, 2, 3, 4}, 1), 1) << "the page is known, the state is new";
  EXPECT_EQ(match({1, 2, 3, 4, 5, 6, 7, 8}).pos, 4);
  EXPECT_STREQ(match({1, 2, 3, 4, 9, 9, 9, 9, 9, 9}).miss, "none");
  EXPECT_EQ(match({1, 2, 3}).pos, 0);
}

TEST_F(PrefixTreeTest, ConversationsResumeWhereTheyEnded) {
  insert({1, 2, 3, 4, 5, 6}, 1);
  insert({1, 2, 3, 4, 5}, 1);
  insert({1, 2, 3, 4, 5, 6, 7}, 0);
  const PrefixMatch six = match({1, 2, 3, 4, 5, 6, 8, 9, 9});
  EXPECT_EQ(six.pos, 6);
  EXPECT_GE(six.tail_page, 0);
  ASSERT_EQ(six.snapshot.size(), 1u);
  const PrefixMatch five = match({1, 2, 3, 4, 5, 7, 7});
  EXPECT_EQ(five.pos, 5);
  EXPECT_NE(five.snapshot[0], six.snapshot[0]);
  EXPECT_NE(five.tail_page, six.tail_page);
  EXPECT_EQ(match({1, 2, 3, 4, 9, 9}).pos, 0);
  EXPECT_TRUE(tree.has_state(Tokens{1, 2, 3, 4, 5}));
  EXPECT_FALSE(tree.has_state(Tokens{1, 2, 3, 4}));
}

TEST_F(PrefixTreeTest, EqualPagesBecomeOne) {
  Tokens mine = {pool.allocate().value()}, theirs = {pool.allocate().value()};
  tree.insert(Tokens{1, 2, 3, 4}, mine);
  EXPECT_EQ(tree.insert(Tokens{1, 2, 3, 4}, theirs), 1);
  EXPECT_EQ(theirs, mine);
  EXPECT_EQ(pool.references(mine[0]), 3);
  EXPECT_EQ(pool.num_in_use(), 1);
}

TEST_F(PrefixTreeTest, TellsWhatIsMissing) {
  EXPECT_STREQ(match({1, 2, 3, 4, 5}).miss, "new");
  insert({1, 2, 3, 4, 5, 6, 7, 8}, 1);
  EXPECT_STREQ(match({1, 2, 3, 4, 5, 6, 7, 8, 9}).miss, "none") << "all of it comes again";
  EXPECT_STREQ(match({1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 9, 9, 9, 9}).miss, "none");
  EXPECT_STREQ(match({1, 2, 3, 4, 5, 6, 7}).miss, "tail") << "no state so far";
  EXPECT_STREQ(match({9, 9}).miss, "new");
  while (tree.evict()) continue;
  check();
  EXPECT_STREQ(match({1, 2, 3, 4, 5}).miss, "evicted");
  EXPECT_STREQ(match({2, 2, 3, 4, 5}).miss, "new");
}

TEST_F(PrefixTreeTest, WithAStateGoThePagesThatLeadToNoOther) {
  insert({1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2}, 2);
  insert({1, 1, 1, 1, 3, 3, 3, 3}, 2);
  insert({1, 1, 1, 1}, 2, StateKind::kPage);
  EXPECT_EQ(pool.num_in_use(), 4 + 6);
  EXPECT_EQ(use({1, 1, 1, 1, 3, 3, 3, 3, 3}), 8);
  EXPECT_EQ(use({1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2}), 12);
  ASSERT_TRUE(tree.evict());
  EXPECT_EQ(pool.num_in_use(), 4 + 4) << "the beginning's, which nobody began with";
  ASSERT_TRUE(tree.evict());
  ASSERT_TRUE(tree.evict());
  EXPECT_FALSE(tree.evict());
  EXPECT_EQ(pool.num_free(), 24);
  check();
}

TEST_F(PrefixTreeTest, PagesOfRunningSequencesStay) {
  Tokens pages = {pool.allocate().value()};
  tree.insert(Tokens{1, 2, 3, 4}, pages);
  EXPECT_FALSE(tree.evict());
  pool.release(pages[0]);
  EXPECT_TRUE(tree.evict());
  EXPECT_EQ(pool.num_free(), 24);
}

TEST_F(PrefixTreeTest, WhatCostsMoreToComputeAgainStays) {
  insert(Tokens(16, 1), 2);
  insert({2, 2, 2, 2}, 2);
  ASSERT_TRUE(tree.evict());
  EXPECT_EQ(match(Tokens(17, 1)).pos, 16) << "16 tokens for six pages";
  EXPECT_EQ(match({2, 2, 2, 2, 2}).pos, 0) << "four tokens for three pages";
}

// More conversations than there is room for, round and round: what comes next stays, not what came
// last, or every one would be gone when its turn comes.
TEST_F(PrefixTreeTest, GoingRoundKeepsWhatFits) {
  constexpr int64_t kTalks = 9, kFit = 6;  // of four pages
  int64_t hits = 0, turns = 0;
  for (int64_t round = 0; round < 10; ++round) {
    for (int64_t talk = 0; talk < kTalks; ++talk) {
      const bool hit = use(Tokens(13, 10 + talk)) > 0;
      if (round >= 3) hits += hit ? 1 : 0, ++turns;
      if (!hit) insert(Tokens(12, 10 + talk), 1);
    }
  }
  // One place is that of whoever comes.
  EXPECT_GE(hits * kTalks, turns * (kFit - 2));
}

TEST(StateValue, WaitsAreThoseOfTheConversation) {
  EXPECT_EQ(expected_wait(0, 0, 30), 30);
  EXPECT_GT(expected_wait(50, 0, 30), expected_wait(10, 0, 30))
      << "never seen again: the longer the less";
  EXPECT_LT(expected_wait(80, 90, 30), expected_wait(10, 90, 30))
      << "what is nearly due comes first";
  EXPECT_GT(expected_wait(400, 90, 30), expected_wait(10, 90, 30)) << "long overdue: given up";
  StateOdds odds;
  EXPECT_GT(odds.against(StateKind::kPage), odds.against(StateKind::kEnd));
  const double before = odds.against(StateKind::kPrompt);
  for (int i = 0; i < 20; ++i) {
    odds.count_used(StateKind::kPrompt);
  }
  EXPECT_LT(odds.against(StateKind::kPrompt), before) << "it turns out to be of use";
}

// Against a list of all that was inserted, with nothing evicted.
TEST(PrefixTree, LongestPrefixOfRandomConversations) {
  PagePool pool(4000);
  PrefixTree tree(3, pool);
  std::vector<Tokens> known;
  const Philox random(5, 0);
  uint64_t counter = 0;
  const auto draw = [&](uint32_t below) {
    return static_cast<int64_t>(random.block(counter++)[0] % below);
  };
  for (int i = 0; i < 600; ++i) {
    Tokens tokens;
    if (!known.empty() && draw(3) > 0) {
      tokens = known[static_cast<size_t>(draw(static_cast<uint32_t>(known.size())))];
      tokens.resize(static_cast<size_t>(draw(static_cast<uint32_t>(tokens.size()) + 1)));
    }
    for (int64_t more = draw(6) + 1; more > 0; --more) tokens.push_back(draw(2));
    const auto size = static_cast<int64_t>(tokens.size());
    int64_t best = 0;
    for (const Tokens& other : known) {
      if (other.size() < tokens.size() && std::equal(other.begin(), other.end(), tokens.begin())) {
        best = std::max(best, static_cast<int64_t>(other.size()));
      }
    }
    ASSERT_EQ(tree.match(tokens, size - 1).pos, best);
    Tokens pages;
    for (int64_t page = 0; page < (size + 2) / 3; ++page) pages.push_back(pool.allocate().value());
    tree.insert(tokens, pages);
    const Tokens state = {pool.allocate().value()};
    if (tree.has_state(tokens)) {
      pool.release(state[0]);
    } else {
      tree.keep_state(tokens, pages, state, StateKind::kEnd);
    }
    for (const int64_t page : pages) pool.release(page);
    known.push_back(tokens);
  }
  std::vector<int64_t> expected(4000);
  tree.check_integrity(expected);
  EXPECT_NO_THROW(pool.check_integrity(expected));
}

}  // namespace
}  // namespace hadal::engine_core
