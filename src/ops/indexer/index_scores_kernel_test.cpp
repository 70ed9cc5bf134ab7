// Index scores and the choice on a card against their twin on the CPU, bit for bit.
#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include "ops/indexer/index_scores_sm90.h"
#include "testing/on_device.h"

namespace hadal::ops {
namespace {

using testing::OnDevice;

/// Rows of 68 bytes; some have groups of zeros, some scales further apart than 2^14, some nothing.
std::vector<uint8_t> random_rows(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<uint8_t> rows(static_cast<size_t>(count * kIndexRowBytes));
  for (int64_t r = 0; r < count; ++r) {
    uint8_t* row = rows.data() + r * kIndexRowBytes;
    for (int i = 0; i < 64; ++i) row[i] = static_cast<uint8_t>(random());
    for (int i = 64; i < 68; ++i) row[i] = static_cast<uint8_t>(120 + random() % 8);
    const auto kind = random() % 16;
    if (kind < 3) {  // a group of zeros of both signs, with the scale that quantising gives it
      const auto group = random() % 4;
      for (unsigned i = 0; i < 16; ++i) row[group * 16 + i] &= 0x88;
      row[64 + group] = 1;
    }
    if (kind == 3) row[64 + random() % 4] = 100;
    if (kind == 4) std::fill(row, row + 64, uint8_t{0});
    if (kind == 5) std::fill(row + 64, row + 68, static_cast<uint8_t>(3 + random() % 6));
  }
  return rows;
}

class IndexScoresSm90 : public ::testing::TestWithParam<int> {};

TEST_P(IndexScoresSm90, GiveTheTwinsBits) {
  const int64_t heads = GetParam(), tokens = 3, sequences = 2, max_pages = 5, stride = 320;
  const std::vector<int32_t> visible = {1, 197, 320}, sequence = {1, 0, 1};
  const std::vector<int32_t> pages = {7, 3, 0, 9, 2, 1, 8, 4, 6, 5};
  const auto q = random_rows(tokens * heads, 1), keys = random_rows(10 * kIndexPageRows, 2);
  std::mt19937 random(3);
  std::vector<uint16_t> w(static_cast<size_t>(tokens * heads));
  for (uint16_t& value : w) value = static_cast<uint16_t>((random() & 0x80ff) | 0x3d00);
  ASSERT_EQ(pages.size(), static_cast<size_t>(sequences * max_pages));

  const OnDevice<uint8_t> q_there(q), keys_there(keys);
  const OnDevice<uint16_t> w_there(w);
  const OnDevice<int32_t> pages_there(pages), sequence_there(sequence), visible_there(visible);
  const OnDevice<uint16_t> scores(static_cast<size_t>(tokens * stride));
  index_scores_sm90(
      {q_there.get(), w_there.get(), keys_there.get(), pages_there.get(), sequence_there.get(),
       visible_there.get(), scores.get(), tokens, heads, max_pages, stride},
      nullptr);
  const std::vector<uint16_t> found = scores.read();
  for (int64_t t = 0; t < tokens; ++t) {
    int64_t wrong = 0;
    for (int64_t b = 0; b < visible[t]; ++b) {
      const int64_t page = pages[sequence[t] * max_pages + b / kIndexPageRows];
      const uint8_t* key =
          keys.data() + (page * kIndexPageRows + b % kIndexPageRows) * kIndexRowBytes;
      const float expected =
          index_score_twin(q.data() + t * heads * kIndexRowBytes, w.data() + t * heads, key, heads);
      if (std::bit_cast<uint32_t>(expected) >> 16 != found[t * stride + b] && wrong++ == 0) {
        ADD_FAILURE() << "token " << t << " block " << b << ": " << expected << ", found bits "
                      << std::hex << found[t * stride + b];
      }
    }
    EXPECT_EQ(wrong, 0) << "token " << t;
    for (int64_t b = visible[t]; b < stride; ++b)
      ASSERT_EQ(found[t * stride + b], 0xffff) << "block " << b << " is not visible";
  }
}

INSTANTIATE_TEST_SUITE_P(Heads,
                         IndexScoresSm90,
                         ::testing::Values(1, 4, 8, 12, 16, 20, 32, 33, 64));

// A step may have more tokens than the second dimension of a grid.
TEST(IndexScoresSm90, ServeMoreThan65535Tokens) {
  const int64_t tokens = 66000, stride = kIndexPageRows;
  const auto q = random_rows(tokens, 5), keys = random_rows(kIndexPageRows, 6);
  const std::vector<uint16_t> w(static_cast<size_t>(tokens), 0x3f80);
  const OnDevice<uint8_t> q_there(q), keys_there(keys);
  const OnDevice<uint16_t> w_there(w), scores(static_cast<size_t>(tokens * stride));
  const OnDevice<int32_t> pages(std::vector<int32_t>{0}),
      sequence(std::vector<int32_t>(w.size(), 0)), visible(std::vector<int32_t>(w.size(), 64));
  index_scores_sm90({q_there.get(), w_there.get(), keys_there.get(), pages.get(), sequence.get(),
                     visible.get(), scores.get(), tokens, 1, 1, stride},
                    nullptr);
  const std::vector<uint16_t> found = scores.read();
  for (const int64_t t : {int64_t{0}, int64_t{65535}, int64_t{65536}, tokens - 1}) {
    for (int64_t b = 0; b < stride; ++b) {
      const float expected = index_score_twin(q.data() + t * kIndexRowBytes, w.data(),
                                              keys.data() + b * kIndexRowBytes, 1);
      ASSERT_EQ(found[static_cast<size_t>(t * stride + b)], std::bit_cast<uint32_t>(expected) >> 16)
          << "token " << t << " block " << b;
    }
  }
}

TEST(IndexTopkSm90, IsTheStableSortsChoice) {
  for (const auto& [values, stride] : std::vector<std::pair<int64_t, int64_t>>{
           {3, 20000}, {200, 20000}, {65536, 20000}, {3, 16384}, {65536, 16384}}) {
    const int64_t tokens = 6, k = 512;
    const std::vector<int32_t> visible = {0, 17, 512, 513, 9001, static_cast<int32_t>(stride)};
    std::mt19937 random(4);
    std::vector<uint16_t> scores(static_cast<size_t>(tokens * stride));
    // Few values make ties; 65536 of them hold NaN, infinities and both zeros.
    for (uint16_t& score : scores) {
      const auto value = static_cast<uint16_t>(random() % static_cast<unsigned>(values));
      score = values == 65536 ? value
                              : static_cast<uint16_t>(0x3f00 + value * 3 + (random() % 2 << 15));
    }
    const OnDevice<uint16_t> scores_there(scores);
    const OnDevice<int32_t> visible_there(visible);
    const OnDevice<int32_t> blocks(static_cast<size_t>(tokens * k));
    index_topk_sm90({scores_there.get(), visible_there.get(), blocks.get(), tokens, stride, k},
                    nullptr);
    const std::vector<int32_t> found = blocks.read();
    for (int64_t t = 0; t < tokens; ++t) {
      std::vector<int32_t> order(static_cast<size_t>(visible[t]));
      std::iota(order.begin(), order.end(), 0);
      const auto value = [&](int32_t b) {
        const float v = std::bit_cast<float>(static_cast<uint32_t>(scores[t * stride + b]) << 16);
        return v == v ? v : -std::numeric_limits<float>::infinity();
      };
      const auto is_nan = [&](int32_t b) { return (scores[t * stride + b] & 0x7fff) > 0x7f80; };
      std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
        if (is_nan(a) != is_nan(b)) return is_nan(b);
        return value(a) > value(b);
      });
      order.resize(std::min<size_t>(order.size(), k));
      std::sort(order.begin(), order.end());
      order.resize(k, -1);
      EXPECT_TRUE(std::equal(order.begin(), order.end(), found.begin() + t * k))
          << "token " << t << " of " << visible[t] << ", " << values << " values";
    }
  }
}

}  // namespace
}  // namespace hadal::ops
