#include "ops/cache/batch.h"

#include <random>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"

namespace hadal::ops {
namespace {

std::vector<int64_t> values(const at::Tensor& x) {
  const at::Tensor y = x.to(at::kLong).contiguous();
  return {y.const_data_ptr<int64_t>(), y.const_data_ptr<int64_t>() + y.numel()};
}

TEST(Batch, KnowsWhereItsTokensSit) {
  const Batch batch({3, 1, 2}, {0, 7, 4}, at::kCPU);
  EXPECT_EQ(batch.num_seqs(), 3);
  EXPECT_EQ(batch.num_tokens(), 6);
  EXPECT_EQ(batch.cu_seqlens(), (std::vector<int64_t>{0, 3, 4, 6}));
  EXPECT_EQ(batch.host_pos(), (std::vector<int64_t>{0, 1, 2, 7, 4, 5}));
  EXPECT_EQ(values(batch.pos()), batch.host_pos());
  EXPECT_EQ(values(batch.seq()), (std::vector<int64_t>{0, 0, 0, 1, 2, 2}));
  EXPECT_EQ(batch.max_end_pos(), 8);
  EXPECT_FALSE(batch.whole());
  EXPECT_TRUE(Batch({3, 1}, {0, 0}, at::kCPU).whole());
  EXPECT_EQ(values(batch.device_cu_seqlens()), batch.cu_seqlens());
}

TEST(Batch, RefusesRunsThatCannotBe) {
  EXPECT_THROW(Batch({0}, {0}, at::kCPU), Error);
  EXPECT_THROW(Batch({1}, {-1}, at::kCPU), Error);
  EXPECT_THROW(Batch({1, 1}, {0}, at::kCPU), Error);
}

// However a sequence is cut into steps, each block is completed once, in order, by the step that
// holds its last token, and names the rows of this step or the positions before it.
TEST(BlockPlan, EveryCutCompletesEveryBlockOnce) {
  std::mt19937 random(3);
  for (const int64_t ratio : {4, 16}) {
    for (int round = 0; round < 20; ++round) {
      std::vector<int64_t> starts = {0, static_cast<int64_t>(random() % 40)}, next_block(2);
      for (size_t seq = 0; seq < 2; ++seq) next_block[seq] = starts[seq] / ratio;
      for (int step = 0; step < 12; ++step) {
        const std::vector<int64_t> lengths = {1 + static_cast<int64_t>(random() % 23),
                                              1 + static_cast<int64_t>(random() % 5)};
        const Batch batch(lengths, starts, at::kCPU);
        const BlockPlan& plan = batch.blocks(ratio);
        const std::vector<int64_t> first_pos = values(plan.pos);
        const std::vector<int64_t> previous = values(plan.previous), rows = values(plan.rows);
        for (int64_t seq = 0; seq < 2; ++seq) {
          const auto s = static_cast<size_t>(seq);
          EXPECT_EQ(plan.first_block[s], next_block[s]);
          for (int64_t b = plan.cu_blocks[s]; b < plan.cu_blocks[s + 1]; ++b, ++next_block[s]) {
            EXPECT_EQ(first_pos[static_cast<size_t>(b)], next_block[s] * ratio);
            const bool first = b == plan.cu_blocks[s];
            EXPECT_EQ(previous[static_cast<size_t>(b)], first ? seq : 2 + b - 1);
            for (int64_t j = 0; j < ratio; ++j) {
              const int64_t pos = next_block[s] * ratio + j;
              const int64_t row = rows[static_cast<size_t>(b * ratio + j)];
              EXPECT_EQ(row, pos < starts[s] ? -1 - pos : batch.begin(seq) + pos - starts[s]);
            }
          }
          EXPECT_EQ(next_block[s], (starts[s] + lengths[s]) / ratio);
        }
        for (size_t seq = 0; seq < 2; ++seq) starts[seq] += lengths[seq];
      }
    }
  }
}

// Tiles hold every token once, and none crosses a sequence.
TEST(Batch, TilesCoverTokensAndBlocks) {
  const Batch batch({70, 5, 64}, {0, 0, 0}, at::kCPU);
  std::vector<int64_t> seen(139, 0);
  const at::Tensor tiles = batch.token_tiles(32);
  for (int64_t i = 0; i < tiles.size(0); ++i) {
    const auto tile = values(tiles[i]);
    EXPECT_LE(tile[1], 32);
    EXPECT_EQ(tile[2], tile[0] - batch.begin(tile[3]));
    EXPECT_LE(tile[0] + tile[1], batch.end(tile[3]));
    for (int64_t row = tile[0]; row < tile[0] + tile[1]; ++row) ++seen[static_cast<size_t>(row)];
  }
  EXPECT_EQ(seen, std::vector<int64_t>(139, 1));
}

TEST(BlockView, FindsRowsThroughPages) {
  const at::Tensor rows = at::arange(24, at::kFloat).reshape({12, 2});
  const BlockView view = BlockView::paged(rows, {{2, 0, 1}}, 4);
  EXPECT_EQ(view.table().row(0, 0), 8);
  EXPECT_EQ(view.table().row(0, 5), 1);
  EXPECT_EQ(view.table().row(0, 11), 7);
  EXPECT_TRUE(at::equal(view.gather(0, 3, 6), rows.index_select(0, at::tensor({11, 0, 1}))));
}

}  // namespace
}  // namespace hadal::ops
