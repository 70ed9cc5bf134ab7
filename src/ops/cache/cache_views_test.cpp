#include "ops/cache/cache_views.h"

#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"
#include "testing/numbers_of.h"

namespace hadal::ops {
namespace {

using testing::numbers_of;

TEST(BlockView, FindsRowsThroughPages) {
  const at::Tensor rows = at::arange(24, at::kFloat).reshape({12, 2});
  const BlockView view = BlockView::paged(rows, {{2, 0, 1}}, 4);
  EXPECT_EQ(view.table().row(0, 0), 8);
  EXPECT_EQ(view.table().row(0, 5), 1);
  EXPECT_EQ(view.table().row(0, 11), 7);
  EXPECT_TRUE(at::equal(view.gather(0, 3, 6), rows.index_select(0, at::tensor({11, 0, 1}))));
}

// Tensors of numbers, for devices whose tables the host cannot read, and the formula of kernels.
TEST(RingView, NumbersAreThoseOfItsTable) {
  const at::Tensor rows = at::arange(40, at::kFloat).reshape({20, 2});
  const RingView view = RingView::of_slots(rows, {3, 1}, 5);
  for (const int64_t seq : {0, 1}) {
    std::vector<int64_t> expected;
    for (int64_t pos = 7; pos < 19; ++pos) expected.push_back(view.table().row(seq, pos));
    EXPECT_EQ(numbers_of(view.numbers(seq, 7, 19)), expected);
    EXPECT_TRUE(at::equal(view.gather(seq, 7, 19), rows.index_select(0, at::tensor(expected))));
  }
  EXPECT_EQ(view.table().row(0, 7), 17);
  EXPECT_EQ(
      numbers_of(view.numbers(at::tensor({1, 0, 1}, at::kLong), at::tensor({12, 9, 0}, at::kLong))),
      (std::vector<int64_t>{7, 19, 5}));
}

TEST(RingView, GathersPackedRows) {
  const RowFormat format{.kind = RowKind::kIndexKey, .width = 64};
  at::Tensor rows = at::zeros({6, 64}, at::kBFloat16);
  for (int64_t row = 0; row < 6; ++row) rows[row].fill_(static_cast<double>(row));  // FP4 values
  rows[5].fill_(6.0);
  RingView view = RingView::of_slots(pack_rows(rows, format), {1}, 3);
  view.format = format;
  EXPECT_TRUE(testing::same_bits(view.gather(0, 1, 4),
                                 rows.index_select(0, at::tensor({4, 5, 3}, at::kLong))));
}

TEST(BlockView, ConsecutiveBlocksBeginAtAnyRow) {
  const at::Tensor rows = at::arange(24, at::kFloat).reshape({12, 2});
  const BlockView view = BlockView::consecutive(rows, {2, 7});
  EXPECT_EQ(view.table().row(0, 3), 5);
  EXPECT_EQ(view.table().row(1, 4), 11);
  EXPECT_TRUE(at::equal(view.gather(1, 1, 4), rows.narrow(0, 8, 3)));
}

}  // namespace
}  // namespace hadal::ops
