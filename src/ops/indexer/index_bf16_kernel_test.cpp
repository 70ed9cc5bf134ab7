// Index scores of BF16 keys and the choice among FP32 scores on a card against the twin and a
// stable sort, bit for bit.
#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "ops/indexer/index_bf16_sm90.h"
#include "testing/on_device.h"
#include "testing/product_data.h"

namespace hadal::ops {
namespace {

using testing::Data;
using testing::OnDevice;
using testing::random_bf16;

class IndexScoresBf16Sm90 : public ::testing::TestWithParam<int> {};

TEST_P(IndexScoresBf16Sm90, GiveTheTwinsBits) {
  const int64_t heads = GetParam(), tokens = 4, stride = 320, page_blocks = 32, pages_each = 10;
  const std::vector<int32_t> visible = {1, 197, 320, 0}, slots = {1, 0};
  const std::vector<int64_t> seq = {1, 0, 1, 0};
  std::vector<int32_t> pages(static_cast<size_t>(2 * pages_each));
  std::iota(pages.begin(), pages.end(), 0);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(1));
  for (const Data data : {Data::kWide, Data::kSparse}) {
    const auto q = random_bf16(static_cast<size_t>(tokens * heads * kIndexDim), data, 2);
    const auto w = random_bf16(static_cast<size_t>(tokens * heads), Data::kWide, 3);
    const auto keys =
        random_bf16(static_cast<size_t>(2 * pages_each * page_blocks * kIndexDim), data, 4);
    const OnDevice<uint16_t> q_there(q), w_there(w), keys_there(keys);
    const OnDevice<int32_t> slots_there(slots), pages_there(pages), visible_there(visible);
    const OnDevice<int64_t> seq_there(seq);
    const OnDevice<uint32_t> scores(static_cast<size_t>(tokens * stride));
    index_scores_bf16_sm90({.q = q_there.get(),
                            .w = w_there.get(),
                            .keys = keys_there.get(),
                            .rows = {.slots = slots_there.get(),
                                     .pages = pages_there.get(),
                                     .stride = pages_each,
                                     .page_blocks = page_blocks,
                                     .page_rows = page_blocks},
                            .seq = seq_there.get(),
                            .visible = visible_there.get(),
                            .scores = reinterpret_cast<float*>(scores.get()),
                            .tokens = tokens,
                            .heads = heads,
                            .stride = stride},
                           nullptr);
    const std::vector<uint32_t> found = scores.read();
    const BlockRows table{.slots = slots.data(),
                          .pages = pages.data(),
                          .stride = pages_each,
                          .page_blocks = page_blocks,
                          .page_rows = page_blocks};
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t b = 0; b < stride; ++b) {
        uint32_t expected = 0xffffffffu;  // what is not visible is not written
        if (b < visible[static_cast<size_t>(t)]) {
          expected = std::bit_cast<uint32_t>(index_score_bf16_twin(
              q.data() + t * heads * kIndexDim, w.data() + t * heads,
              keys.data() + table.row(seq[static_cast<size_t>(t)], b) * kIndexDim, heads));
        }
        ASSERT_EQ(found[static_cast<size_t>(t * stride + b)], expected)
            << "token " << t << " block " << b << " data " << static_cast<int>(data);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Heads, IndexScoresBf16Sm90, ::testing::Values(1, 4, 8, 12, 33, 64));

TEST(IndexTopkF32Sm90, IsTheStableSortsChoice) {
  // Few values make ties; 0: any bits, NaN, infinities and both zeros among them.
  for (const unsigned values : {3u, 5000u, 0u}) {
    const int64_t tokens = 6, stride = 20000, k = 512;
    const std::vector<int32_t> visible = {0, 17, 512, 513, 9001, 20000};
    std::mt19937 random(4);
    std::vector<float> scores(static_cast<size_t>(tokens * stride));
    for (float& score : scores) {
      const auto bits = static_cast<uint32_t>(random());
      score = values == 0 ? std::bit_cast<float>(random() % 8 == 0   ? 0x7fc00000u
                                                 : random() % 8 == 0 ? bits & 0x80000000u
                                                                     : bits)
                          : (static_cast<float>(bits % values) - 1.0f) * 0.37f;
    }
    const OnDevice<float> scores_there(scores);
    const OnDevice<int32_t> visible_there(visible), blocks(static_cast<size_t>(tokens * k));
    index_topk_f32_sm90({scores_there.get(), visible_there.get(), blocks.get(), tokens, stride, k},
                        nullptr);
    const std::vector<int32_t> found = blocks.read();
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<int32_t> order(static_cast<size_t>(visible[static_cast<size_t>(t)]));
      std::iota(order.begin(), order.end(), 0);
      const auto value = [&](int32_t b) { return scores[static_cast<size_t>(t * stride + b)]; };
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        const bool a_nan = value(a) != value(a), b_nan = value(b) != value(b);
        return a_nan || b_nan ? b_nan && !a_nan : value(a) > value(b);
      });
      order.resize(std::min<size_t>(order.size(), static_cast<size_t>(k)));
      std::sort(order.begin(), order.end());
      order.resize(static_cast<size_t>(k), -1);
      EXPECT_TRUE(std::equal(order.begin(), order.end(), found.begin() + t * k))
          << "token " << t << ", " << values << " values";
    }
  }
}

}  // namespace
}  // namespace hadal::ops
