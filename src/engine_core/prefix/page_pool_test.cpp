#include "engine_core/prefix/page_pool.h"

#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/philox.h"

namespace hadal::engine_core {
namespace {

TEST(PagePool, CountsReferencesAndCachedPages) {
  PagePool pool(2);
  const int64_t page = pool.allocate().value();
  EXPECT_EQ(pool.references(page), 1);
  pool.share_with_tree(page);
  EXPECT_EQ(pool.num_cached(), 0);
  pool.release(page);
  EXPECT_EQ(pool.num_cached(), 1);
  EXPECT_THROW(pool.release(page), Error) << "the tree's reference is not a sequence's";
  pool.share(page);
  EXPECT_EQ(pool.num_cached(), 0);
  pool.release_from_tree(page);
  EXPECT_EQ(pool.num_free(), 1);
  pool.release(page);
  EXPECT_EQ(pool.num_free(), 2);
  EXPECT_THROW(pool.share(page), Error);
  EXPECT_THROW(pool.release(7), Error);
}

TEST(PagePool, RandomOperationsKeepCounts) {
  PagePool pool(9);
  std::vector<int64_t> expected(9), tree(9);
  const Philox random(1, 0);
  for (uint64_t i = 0; i < 20000; ++i) {
    const auto draw = random.block(i);
    const auto at = static_cast<size_t>(draw[0] % 9);
    const auto page = static_cast<int64_t>(at);
    if (draw[1] % 4 == 0) {
      const std::optional<int64_t> got = pool.allocate();
      ASSERT_EQ(got.has_value(), pool.num_free() + (got ? 1 : 0) > 0);
      if (got) ++expected[static_cast<size_t>(*got)];
    } else if (draw[1] % 4 == 1 && expected[at] > 0) {
      pool.share(page);
      ++expected[at];
    } else if (draw[1] % 4 == 2 && expected[at] > tree[at]) {
      pool.release(page);
      --expected[at];
    } else if (draw[1] % 4 == 3 && expected[at] > 0) {
      if (tree[at] != 0) {
        pool.release_from_tree(page);
      } else {
        pool.share_with_tree(page);
      }
      expected[at] += tree[at] != 0 ? -1 : 1;
      tree[at] = 1 - tree[at];
    }
    ASSERT_NO_THROW(pool.check_integrity(expected));
  }
  ++expected[0];
  EXPECT_THROW(pool.check_integrity(expected), Error);
}

TEST(SlotPool, HandsOutEachSlotOnce) {
  SlotPool pool(2);
  const int64_t a = pool.allocate().value(), b = pool.allocate().value();
  EXPECT_NE(a, b);
  EXPECT_FALSE(pool.allocate());
  pool.release(a);
  EXPECT_THROW(pool.release(a), Error);
  EXPECT_NO_THROW(pool.check_integrity(std::vector<int64_t>{b}));
  EXPECT_THROW(pool.check_integrity(std::vector<int64_t>{a}), Error);
  EXPECT_EQ(pool.num_free(), 1);
}

}  // namespace
}  // namespace hadal::engine_core
