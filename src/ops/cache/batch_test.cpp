#include "ops/cache/batch.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/numbers_of.h"

namespace hadal::ops {
namespace {

using testing::numbers_of;

TEST(Batch, KnowsWhereItsTokensSit) {
  const Batch batch({3, 1, 2}, {0, 7, 4}, at::kCPU);
  EXPECT_EQ(batch.num_seqs(), 3);
  EXPECT_EQ(batch.num_tokens(), 6);
  EXPECT_EQ(batch.cu_seqlens(), (std::vector<int64_t>{0, 3, 4, 6}));
  EXPECT_EQ(batch.host_pos(), (std::vector<int64_t>{0, 1, 2, 7, 4, 5}));
  EXPECT_EQ(numbers_of(batch.pos()), batch.host_pos());
  EXPECT_EQ(numbers_of(batch.seq()), (std::vector<int64_t>{0, 0, 0, 1, 2, 2}));
  EXPECT_EQ(batch.max_end_pos(), 8);
  EXPECT_FALSE(batch.whole());
  EXPECT_TRUE(Batch({3, 1}, {0, 0}, at::kCPU).whole());
  EXPECT_EQ(numbers_of(batch.device_cu_seqlens()), batch.cu_seqlens());
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
        const std::vector<int64_t> first_pos = numbers_of(plan.pos);
        const std::vector<int64_t> previous = numbers_of(plan.previous),
                                   rows = numbers_of(plan.rows);
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
    const auto tile = numbers_of(tiles[i]);
    EXPECT_LE(tile[1], 32);
    EXPECT_EQ(tile[2], tile[0] - batch.begin(tile[3]));
    EXPECT_LE(tile[0] + tile[1], batch.end(tile[3]));
    for (int64_t row = tile[0]; row < tile[0] + tile[1]; ++row) ++seen[static_cast<size_t>(row)];
  }
  EXPECT_EQ(seen, std::vector<int64_t>(139, 1));
}

// Random steps over slots and pages: every table says what the definition does, with and without
// memory of its own.
TEST(Batch, TablesSayWhereEverythingGoes) {
  constexpr int64_t kPageTokens = 16, kSlots = 5, kPages = 40, kRing = 11;
  std::mt19937 random(1);
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random()) % n; };
  PageTable pages(kSlots, kPages, kPages, at::kCPU);
  TableMemory memory(at::kCPU);
  const std::vector<int64_t> ratios = {4, 16}, rings = {kRing};
  for (int round = 0; round < 100; ++round) {
    std::vector<int64_t> all(kPages), slots(kSlots), lengths, starts;
    std::iota(all.begin(), all.end(), 0);
    std::iota(slots.begin(), slots.end(), 0);
    std::shuffle(all.begin(), all.end(), random);
    std::shuffle(slots.begin(), slots.end(), random);
    slots.resize(static_cast<size_t>(1 + below(kSlots)));
    for (const int64_t slot : slots) {
      starts.push_back(below(90));
      lengths.push_back(1 + below(30));
      pages.update(slot, std::span(all).subspan(static_cast<size_t>(slot * 8), 8));
    }
    const StepPlaces places{.slots = slots,
                            .pages = &pages,
                            .page_tokens = kPageTokens,
                            .memory = round % 2 == 0 ? &memory : nullptr,
                            .ratios = ratios,
                            .ring_sizes = rings};
    const Batch batch(lengths, starts, at::kCPU, places);
    EXPECT_EQ(numbers_of(batch.slots()), slots);
    for (const int64_t ratio : ratios) {
      const BlockPlan& plan = batch.blocks(ratio);
      const std::vector<int64_t> rows = numbers_of(plan.cache_rows), seqs = numbers_of(plan.seq);
      ASSERT_EQ(std::ssize(rows), plan.num_blocks());
      for (size_t i = 0; i < rows.size(); ++i) {
        const auto s = static_cast<size_t>(seqs[i]);
        const int64_t block = numbers_of(plan.pos)[i] / ratio, page_blocks = kPageTokens / ratio;
        const int64_t page = all[static_cast<size_t>(slots[s] * 8 + block / page_blocks)];
        EXPECT_EQ(rows[i], page * page_blocks + block % page_blocks);
        const BlockView view{.rows = at::empty({1, 1}),
                             .slots = batch.slots(),
                             .pages = pages.table(),
                             .page_blocks = page_blocks,
                             .page_rows = page_blocks};
        EXPECT_EQ(view.table().row(seqs[i], block), rows[i]);
      }
    }
    const RingWrites& writes = batch.ring_writes(kRing);
    const std::vector<int64_t> from = numbers_of(writes.from), to = numbers_of(writes.to);
    std::vector<int64_t> owner(kSlots * kRing, -1), expected = owner;
    for (size_t i = 0; i < from.size(); ++i) {
      EXPECT_EQ(owner[static_cast<size_t>(to[i])], -1);  // written once
      owner[static_cast<size_t>(to[i])] = from[i];
    }
    for (int64_t token = 0; token < batch.num_tokens(); ++token) {
      const auto s = static_cast<size_t>(numbers_of(batch.seq())[static_cast<size_t>(token)]);
      const int64_t pos = batch.host_pos()[static_cast<size_t>(token)];
      expected[static_cast<size_t>(slots[s] * kRing + pos % kRing)] = token;  // the last one stays
    }
    EXPECT_EQ(owner, expected);
  }
}

// Steps of the same lengths have tables of the same sizes, at the same places, whatever they
// complete.
TEST(Batch, PaddedStepsHaveTheTablesOfEachOther) {
  constexpr int64_t kPageTokens = 16, kPages = 8, kEnd = 64;
  PageTable pages(2, kPages, kPages, at::kCPU);
  const std::vector<int64_t> first = {3, 1, 6, 0}, second = {2, 7, 4, 5};
  pages.update(0, first);
  pages.update(1, second);
  TableMemory memory(at::kCPU);
  const std::vector<int64_t> ratios = {4, 16}, ids = {11, 12, 13, 21, 22};
  std::vector<const void*> addresses;
  int64_t moves = -1;
  for (int64_t start = 0; start < 40; ++start) {
    const StepPlaces places{.slots = {1, 0},
                            .pages = &pages,
                            .page_tokens = kPageTokens,
                            .memory = &memory,
                            .ratios = ratios,
                            .ids = ids,
                            .padded_end = kEnd};
    const Batch batch({3, 2}, {start, start + 9}, at::kCPU, places);
    EXPECT_EQ(batch.max_end_pos(), kEnd);
    EXPECT_EQ(batch.max_length(), 3);
    EXPECT_EQ(numbers_of(batch.ids()), ids);
    EXPECT_EQ(numbers_of(batch.token_slots()), (std::vector<int64_t>{1, 1, 1, 0, 0}));
    std::vector<const void*> found = {batch.pos().const_data_ptr(), batch.ids().const_data_ptr()};
    for (const int64_t ratio : ratios) {
      const std::vector<int64_t> visible = numbers_of(batch.visible(ratio));
      for (size_t t = 0; t < visible.size(); ++t)
        EXPECT_EQ(visible[t], (batch.host_pos()[t] + 1) / ratio);
      const BlockPlan& plan = batch.blocks(ratio);
      const BlockPlan exact = Batch({3, 2}, {start, start + 9}, at::kCPU).blocks(ratio);
      EXPECT_EQ(plan.num_blocks(), 2);  // one a sequence, at most
      EXPECT_EQ(plan.num_blocks() - plan.num_absent, exact.num_blocks());
      EXPECT_EQ(plan.max_pos, kEnd - 1);
      const auto seq = numbers_of(plan.seq), pos = numbers_of(plan.pos),
                 rows = numbers_of(plan.cache_rows);
      for (size_t b = 0; b < seq.size(); ++b) {
        const bool there = static_cast<int64_t>(b) < exact.num_blocks();
        EXPECT_EQ(seq[b], there ? numbers_of(exact.seq)[b] : -1);
        EXPECT_EQ(pos[b], there ? numbers_of(exact.pos)[b] : 0);
        // Absent blocks would go behind all pages.
        EXPECT_EQ(rows[b] == kPages * (kPageTokens / ratio), !there);
      }
      EXPECT_EQ(plan.rows.size(0), 2 * ratio);
      found.push_back(plan.cache_rows.const_data_ptr());
      found.push_back(plan.rows.const_data_ptr());
    }
    // After the first steps nothing moves any more.
    if (start >= 2) {
      if (moves < 0) moves = memory.moves(), addresses = found;
      EXPECT_EQ(memory.moves(), moves);
      EXPECT_EQ(found, addresses);
    }
  }
  StepPlaces late{.slots = {0}, .pages = &pages, .page_tokens = kPageTokens, .padded_end = 10};
  EXPECT_THROW(Batch({3}, {8}, at::kCPU, late), Error);
  late.padded_end = 11;
  EXPECT_NO_THROW(Batch({3}, {8}, at::kCPU, late));
  late.ids = ids;
  EXPECT_THROW(Batch({3}, {8}, at::kCPU, late), Error);
}

// What autograd keeps of a step outlives the step.
TEST(Batch, CopiesShareThePlan) {
  auto batch = std::make_unique<Batch>(std::vector<int64_t>{9}, std::vector<int64_t>{0}, at::kCPU);
  const Batch copy = *batch;
  const BlockPlan* plan = &batch->blocks(4);
  batch.reset();
  EXPECT_EQ(&copy.blocks(4), plan);
  EXPECT_EQ(copy.blocks(4).num_blocks(), 2);
}

}  // namespace
}  // namespace hadal::ops
