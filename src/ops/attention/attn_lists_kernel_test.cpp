// Lists of attention on a card against a walk over positions.
#include <algorithm>
#include <random>
#include <tuple>
#include <vector>

#include "ops/attention/attn_lists_sm90.h"
#include "testing/on_device.h"

namespace hadal::ops {
namespace {

using testing::OnDevice;

constexpr int64_t kRing = 160, kRatio = 4, kPageBlocks = 32, kPages = 40;

struct Piece {
  int64_t start, length;
};

/// Window, and whether blocks are chosen.
class AttnListsSm90 : public ::testing::TestWithParam<std::tuple<int64_t, bool>> {};

TEST_P(AttnListsSm90, HaveTheRowsOfTheirPositions) {
  const auto [positions, chosen] = GetParam();
  const std::vector<Piece> runs = {{0, 1}, {0, 150}, {90, 60}, {127, 1}, {128, 3}, {4000, 300}};
  const int64_t step_row = static_cast<int64_t>(runs.size()) * kRing;
  const int64_t block_places = chosen ? 70 : 4300 / kRatio;
  std::mt19937 random(1);
  std::vector<int64_t> pos, seq;
  std::vector<int32_t> first_row, slots, pages, selection, window, blocks, counts;
  for (size_t s = 0; s < runs.size(); ++s) {
    slots.push_back(static_cast<int32_t>(runs.size() - 1 - s));
    for (int64_t i = 0; i < kPages; ++i) pages.push_back(static_cast<int32_t>(random() % 1000));
  }
  for (size_t s = 0; s < runs.size(); ++s) {
    const auto [start, length] = runs[s];
    const int64_t slot = slots[s];
    first_row.push_back(static_cast<int32_t>(pos.size()));
    for (int64_t p = start; p < start + length; ++p) {
      pos.push_back(p);
      seq.push_back(static_cast<int64_t>(s));
      std::vector<int32_t> places(static_cast<size_t>(attn_window_places(positions)), -1);
      for (int64_t k = std::max<int64_t>(p - positions + 1, 0); k <= p; ++k) {
        places[static_cast<size_t>(k % positions)] = static_cast<int32_t>(
            k < start ? slot * kRing + k % kRing : step_row + first_row[s] + k - start);
      }
      window.insert(window.end(), places.begin(), places.end());
      std::vector<int32_t> seen;
      for (int32_t b = 0; (b + 1) * kRatio <= p + 1; ++b) seen.push_back(b);
      if (chosen && std::ssize(seen) > block_places) {
        std::shuffle(seen.begin(), seen.end(), random);
        seen.resize(static_cast<size_t>(block_places));
        std::sort(seen.begin(), seen.end());
      }
      counts.push_back(static_cast<int32_t>(seen.size()));
      seen.resize(static_cast<size_t>(block_places), -1);
      selection.insert(selection.end(), seen.begin(), seen.end());
      for (const int32_t b : seen) {
        const auto page = static_cast<size_t>(slot * kPages + b / kPageBlocks);
        blocks.push_back(b < 0 ? -1
                               : static_cast<int32_t>(pages[page] * kPageBlocks + b % kPageBlocks));
      }
    }
  }
  const auto tokens = static_cast<int64_t>(pos.size());
  const OnDevice<int64_t> pos_there(pos), seq_there(seq);
  const OnDevice<int32_t> first_row_there(first_row), slots_there(slots), pages_there(pages),
      selection_there(selection), window_row(window.size()), block_row(blocks.size()),
      num_blocks(counts.size());
  const BlockRows rows{.slots = slots_there.get(),
                       .pages = pages_there.get(),
                       .stride = kPages,
                       .page_blocks = kPageBlocks,
                       .page_rows = kPageBlocks};
  attn_lists_sm90({pos_there.get(),
                   seq_there.get(),
                   first_row_there.get(),
                   {.slots = slots_there.get(), .size = kRing},
                   step_row,
                   rows,
                   kRatio,
                   chosen ? selection_there.get() : nullptr,
                   window_row.get(),
                   block_row.get(),
                   num_blocks.get(),
                   tokens,
                   positions,
                   block_places},
                  nullptr);
  EXPECT_EQ(window_row.read(), window);
  EXPECT_EQ(block_row.read(), blocks);
  EXPECT_EQ(num_blocks.read(), counts);
}

INSTANTIATE_TEST_SUITE_P(Windows,
                         AttnListsSm90,
                         ::testing::Combine(::testing::Values(128, 32, 100), ::testing::Bool()));

}  // namespace
}  // namespace hadal::ops
