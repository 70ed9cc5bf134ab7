#include "engine_core/prefix_tree.h"

#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/philox.h"

namespace hadal::engine {
namespace {

using Tokens = std::vector<int64_t>;

std::vector<std::byte> blob(int64_t size, int value = 1) {
  return std::vector<std::byte>(static_cast<size_t>(size), static_cast<std::byte>(value));
}

class PrefixTreeTest : public testing::Test {
 protected:
  // Inserts as a sequence would and gives its references back.
  int64_t insert(const Tokens& tokens, std::optional<std::vector<std::byte>> snapshot) {
    Tokens pages;
    for (size_t i = 0; i < (tokens.size() + 3) / 4; ++i) pages.push_back(pool.allocate().value());
    const int64_t first_new = tree.insert(tokens, pages, std::move(snapshot));
    for (const int64_t page : pages) pool.release(page);
    check();
    return first_new;
  }
  void check() {
    std::vector<int64_t> expected(static_cast<size_t>(pool.num_pages()));
    tree.check_integrity(expected);
    pool.check_integrity(expected);
  }
  PrefixMatch match(const Tokens& tokens) {
    return tree.match(tokens, static_cast<int64_t>(tokens.size()) - 1);
  }

  PagePool pool{12};
  PrefixTree tree{4, 100, pool};
};

TEST_F(PrefixTreeTest, ResumesAtTheLastSnapshotInsideThePrompt) {
  EXPECT_EQ(insert({1, 2, 3, 4, 5, 6, 7, 8}, blob(8)), 0);
  EXPECT_EQ(match({1, 2, 3, 4, 5, 6, 7, 8, 9}).pos, 8);
  const PrefixMatch whole = match({1, 2, 3, 4, 5, 6, 7, 8});
  EXPECT_EQ(whole.pos, 0) << "the last token has to be computed and its page has no earlier state";
  EXPECT_EQ(whole.pages.size(), 2u);
  EXPECT_STREQ(whole.miss, "tail");
  EXPECT_EQ(insert({1, 2, 3, 4}, blob(8)), 1) << "the page is known, the state is new";
  EXPECT_EQ(match({1, 2, 3, 4, 5, 6, 7, 8}).pos, 4);
  EXPECT_STREQ(match({1, 2, 3, 4, 9, 9, 9, 9, 9, 9}).miss, "new");
  EXPECT_EQ(match({1, 2, 3}).pos, 0);
}

TEST_F(PrefixTreeTest, ConversationsResumeWhereTheyEnded) {
  insert({1, 2, 3, 4, 5, 6}, blob(8, 2));
  insert({1, 2, 3, 4, 5}, blob(8, 3));
  insert({1, 2, 3, 4, 5, 6, 7}, std::nullopt);
  const PrefixMatch six = match({1, 2, 3, 4, 5, 6, 8, 9, 9});
  EXPECT_EQ(six.pos, 6);
  EXPECT_GE(six.tail_page, 0);
  EXPECT_EQ(six.snapshot[0], std::byte{2});
  const PrefixMatch five = match({1, 2, 3, 4, 5, 7, 7});
  EXPECT_EQ(five.pos, 5);
  EXPECT_EQ(five.snapshot[0], std::byte{3});
  EXPECT_NE(five.tail_page, six.tail_page);
  EXPECT_EQ(match({1, 2, 3, 4, 9, 9}).pos, 0);
  EXPECT_TRUE(tree.has_snapshot(Tokens{1, 2, 3, 4, 5}));
  EXPECT_FALSE(tree.has_snapshot(Tokens{1, 2, 3, 4}));
}

TEST_F(PrefixTreeTest, EqualPagesBecomeOne) {
  Tokens mine = {pool.allocate().value()}, theirs = {pool.allocate().value()};
  tree.insert(Tokens{1, 2, 3, 4}, mine, blob(1));
  EXPECT_EQ(tree.insert(Tokens{1, 2, 3, 4}, theirs, blob(1)), 1);
  EXPECT_EQ(theirs, mine);
  EXPECT_EQ(pool.references(mine[0]), 3);
  EXPECT_EQ(pool.num_in_use(), 1);
}

TEST_F(PrefixTreeTest, EvictsLeavesByRecencyAndSaysSo) {
  insert({1, 1, 1, 1, 2, 2, 2, 2}, blob(1));
  insert({1, 1, 1, 1, 3, 3, 3, 3}, blob(1));
  insert({1, 1, 1, 1}, blob(1));
  EXPECT_EQ(match({1, 1, 1, 1, 2, 2, 2, 2, 2}).pos, 8);
  EXPECT_TRUE(tree.evict_page());
  check();
  EXPECT_EQ(match({1, 1, 1, 1, 2, 2, 2, 2, 2}).pos, 8) << "used last";
  const PrefixMatch gone = match({1, 1, 1, 1, 3, 3, 3, 3, 3});
  EXPECT_EQ(gone.pos, 4);
  EXPECT_STREQ(gone.miss, "evicted");
  EXPECT_TRUE(tree.evict_page());
  EXPECT_TRUE(tree.evict_page());
  EXPECT_FALSE(tree.evict_page());
  EXPECT_EQ(pool.num_free(), 12);
  check();
}

TEST_F(PrefixTreeTest, PagesOfRunningSequencesStay) {
  Tokens pages = {pool.allocate().value()};
  tree.insert(Tokens{1, 2, 3, 4}, pages, blob(1));
  EXPECT_FALSE(tree.evict_page());
  pool.release(pages[0]);
  EXPECT_TRUE(tree.evict_page());
}

TEST_F(PrefixTreeTest, SnapshotsHaveTheirOwnBudget) {
  insert({1, 1, 1, 1}, blob(30));
  insert({2, 2, 2, 2}, blob(50));
  insert({3, 3, 3, 3}, blob(20));
  insert({4, 4, 4, 4}, blob(10));
  EXPECT_EQ(tree.snapshot_bytes(), 60);
  EXPECT_EQ(match({2, 2, 2, 2, 2}).pos, 0) << "the largest of the old ones goes, with its page";
  EXPECT_STREQ(match({2, 2, 2, 2, 2}).miss, "evicted");
  EXPECT_EQ(pool.num_in_use(), 3);
  EXPECT_EQ(match({1, 1, 1, 1, 1}).pos, 4);
  insert({5, 5, 5, 5, 5}, blob(101));
  EXPECT_EQ(match({5, 5, 5, 5, 5, 5}).pos, 0) << "larger than the budget";
  tree.clear();
  EXPECT_EQ(pool.num_in_use(), 0);
  EXPECT_EQ(tree.snapshot_bytes(), 0);
}

// Against a list of all that was inserted, with nothing evicted.
TEST(PrefixTree, LongestPrefixOfRandomConversations) {
  PagePool pool(4000);
  PrefixTree tree(3, 1 << 20, pool);
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
    tree.insert(tokens, pages, blob(4));
    for (const int64_t page : pages) pool.release(page);
    known.push_back(tokens);
  }
  std::vector<int64_t> expected(4000);
  tree.check_integrity(expected);
  EXPECT_NO_THROW(pool.check_integrity(expected));
}

}  // namespace
}  // namespace hadal::engine
