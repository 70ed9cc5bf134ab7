#include "ops/cache/page_table.h"

#include <vector>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/numbers_of.h"

namespace hadal::ops {
namespace {

using testing::numbers_of;

TEST(PageTable, WritesWhatChanged) {
  PageTable table(3, 8, 100, at::kCPU);
  const std::vector<int64_t> first = {5, 0, 99};
  EXPECT_EQ(table.update(1, first), 2);  // 0 stood there
  EXPECT_EQ(table.update(1, first), 0);
  const std::vector<int64_t> longer = {5, 0, 7, 8};
  EXPECT_EQ(table.update(1, longer), 2);
  EXPECT_EQ(table.update(1, std::span(longer).first(2)), 0);
  EXPECT_EQ(numbers_of(table.table()[1]), (std::vector<int64_t>{5, 0, 7, 8, 0, 0, 0, 0}));
  EXPECT_EQ(numbers_of(table.table()[0]), std::vector<int64_t>(8, 0));
  EXPECT_EQ(table.page(1, 3), 8);
}

TEST(PageTable, RefusesWhatIsNotThere) {
  PageTable table(2, 2, 10, at::kCPU);
  const std::vector<int64_t> good = {3, 4};
  table.update(0, good);
  for (const std::vector<int64_t>& bad :
       {std::vector<int64_t>{1, 10}, std::vector<int64_t>{-1}, std::vector<int64_t>{1, 2, 3}})
    EXPECT_THROW(table.update(0, bad), Error);
  EXPECT_THROW(table.update(2, good), Error);
  EXPECT_THROW(table.update(-1, good), Error);
  EXPECT_EQ(numbers_of(table.table()[0]), good);  // as before
}

}  // namespace
}  // namespace hadal::ops
