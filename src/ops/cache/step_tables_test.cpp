// The tables of a step: what they say, where they stay, what of them is written.
#include <numeric>
#include <random>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/cache/batch.h"

namespace hadal::ops {
namespace {

std::vector<int64_t> values(const at::Tensor& x) {
  const at::Tensor y = x.to(at::kLong).contiguous();
  return {y.const_data_ptr<int64_t>(), y.const_data_ptr<int64_t>() + y.numel()};
}

TEST(TableMemory, KeepsEachTableAtItsAddress) {
  TableMemory memory(at::kCPU);
  const auto step = [&](int64_t count) {
    memory.begin();
    std::vector<int64_t> numbers(static_cast<size_t>(count));
    std::iota(numbers.begin(), numbers.end(), count);
    const at::Tensor a = memory.place({"a", 0}, numbers, at::kLong),
                     b = memory.place({"b", 4}, numbers, at::kInt),
                     c = memory.place({"b", 128}, {}, at::kInt);
    memory.upload();
    EXPECT_EQ(values(a), numbers);
    EXPECT_EQ(values(b), numbers);
    EXPECT_EQ(c.numel(), 0);
    EXPECT_EQ(a.scalar_type(), at::kLong);
    EXPECT_EQ(b.scalar_type(), at::kInt);
    return std::pair(a.const_data_ptr(), b.const_data_ptr());
  };
  step(100);
  const auto settled = step(100);
  const int64_t moves = memory.moves();
  for (const int64_t count : {1, 64, 100, 128}) EXPECT_EQ(step(count), settled);
  step(0);  // an empty tensor has no address
  EXPECT_EQ(step(5), settled);
  EXPECT_EQ(memory.moves(), moves);
  step(1000);  // outgrown
  EXPECT_GT(memory.moves(), moves);
  const auto grown = step(1000);
  EXPECT_EQ(step(3), grown);
}

TEST(TableMemory, RefusesNumbersThatDoNotFit) {
  TableMemory memory(at::kCPU);
  memory.begin();
  const std::vector<int64_t> large = {int64_t{1} << 31};
  EXPECT_THROW(memory.place({"a", 0}, large, at::kInt), Error);
  EXPECT_THROW(memory.place({"a", 0}, large, at::kFloat), Error);
  EXPECT_EQ(values(memory.place({"a", 0}, large, at::kLong)), large);
}

TEST(PageTable, WritesWhatChanged) {
  PageTable table(3, 8, 100, at::kCPU);
  const std::vector<int64_t> first = {5, 0, 99};
  EXPECT_EQ(table.update(1, first), 2);  // 0 stood there
  EXPECT_EQ(table.update(1, first), 0);
  const std::vector<int64_t> longer = {5, 0, 7, 8};
  EXPECT_EQ(table.update(1, longer), 2);
  EXPECT_EQ(table.update(1, std::span(longer).first(2)), 0);
  EXPECT_EQ(values(table.table()[1]), (std::vector<int64_t>{5, 0, 7, 8, 0, 0, 0, 0}));
  EXPECT_EQ(values(table.table()[0]), std::vector<int64_t>(8, 0));
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
  EXPECT_EQ(values(table.table()[0]), good);  // as before
}

// Random steps over slots and pages: every table says what the definition does, with and without
// memory of its own.
TEST(StepTables, SayWhereEverythingGoes) {
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
    EXPECT_EQ(values(batch.slots()), slots);
    for (const int64_t ratio : ratios) {
      const BlockPlan& plan = batch.blocks(ratio);
      const std::vector<int64_t> rows = values(plan.cache_rows), seqs = values(plan.seq);
      ASSERT_EQ(std::ssize(rows), plan.num_blocks());
      for (size_t i = 0; i < rows.size(); ++i) {
        const auto s = static_cast<size_t>(seqs[i]);
        const int64_t block = values(plan.pos)[i] / ratio, page_blocks = kPageTokens / ratio;
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
    const std::vector<int64_t> from = values(writes.from), to = values(writes.to);
    std::vector<int64_t> owner(kSlots * kRing, -1), expected = owner;
    for (size_t i = 0; i < from.size(); ++i) {
      EXPECT_EQ(owner[static_cast<size_t>(to[i])], -1);  // written once
      owner[static_cast<size_t>(to[i])] = from[i];
    }
    for (int64_t token = 0; token < batch.num_tokens(); ++token) {
      const auto s = static_cast<size_t>(values(batch.seq())[static_cast<size_t>(token)]);
      const int64_t pos = batch.host_pos()[static_cast<size_t>(token)];
      expected[static_cast<size_t>(slots[s] * kRing + pos % kRing)] = token;  // the last one stays
    }
    EXPECT_EQ(owner, expected);
  }
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
