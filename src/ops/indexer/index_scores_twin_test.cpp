#include <cmath>
#include <vector>

#include <gtest/gtest.h>

#include "ops/indexer/index_bf16_sm90.h"
#include "ops/indexer/index_scores_sm90.h"

namespace hadal::ops {
namespace {

/// A row whose groups hold `code` in their first place, with these E8M0 scales; code 0: a zero.
std::vector<uint8_t> row(const std::vector<int>& codes, const std::vector<int>& scales) {
  std::vector<uint8_t> bytes(kIndexRowBytes);
  for (size_t group = 0; group < 4; ++group) {
    bytes[group * 16] = static_cast<uint8_t>(codes[group]);
    bytes[64 + group] = static_cast<uint8_t>(scales[group]);
  }
  return bytes;
}

constexpr uint16_t kOne = 0x3f80, kMinusTwo = 0xc000;

TEST(IndexScoreTwin, IsTheSumOverHeadsOfWhatIsPositive) {
  // Codes 2, 4, 5, 10: 1, 2, 3, -1.
  const auto key = row({2, 4, 5, 2}, {127, 128, 126, 127});  // 1, 4, 1.5, 1
  std::vector<uint8_t> q;
  for (const int sign : {2, 10}) {  // the second head is minus the first
    const auto head = row({sign, sign, sign, sign}, {127, 127, 128, 127});  // 1, 1, 2, 1
    q.insert(q.end(), head.begin(), head.end());
  }
  const std::vector<uint16_t> w = {kOne, kOne};
  EXPECT_EQ(index_score_twin(q.data(), w.data(), key.data(), 2), 1.0f + 4.0f + 3.0f + 1.0f);
  const std::vector<uint16_t> negative = {kMinusTwo, kOne};
  EXPECT_EQ(index_score_twin(q.data(), negative.data(), key.data(), 2), -18.0f);
}

TEST(IndexScoreTwin, GroupsOfZerosHaveNoSayAndWideRowsKeepTheirValues) {
  const auto q = row({2, 2, 2, 2}, {127, 127, 127, 127});
  // A group of zeros has the least scale there is, which would make the row a wide one.
  const auto zeros = row({2, 0, 2, 2}, {127, 1, 127, 127});
  EXPECT_EQ(index_score_twin(q.data(), &kOne, zeros.data(), 1), 3.0f);
  const auto nothing = row({0, 0, 0, 0}, {1, 1, 1, 1});
  EXPECT_EQ(index_score_twin(q.data(), &kOne, nothing.data(), 1), 0.0f);
  // 2^20 - 2^20 + 1: the fold would not hold the last beside the first.
  const auto wide = row({2, 10, 2, 0}, {147, 147, 127, 1});
  EXPECT_EQ(index_score_twin(q.data(), &kOne, wide.data(), 1), 1.0f);
}

TEST(IndexScoreTwin, OfBf16KeysRoundsNoScore) {
  std::vector<uint16_t> key(kIndexDim), q(2 * kIndexDim);
  key[0] = kOne, key[127] = kOne;
  q[0] = 0x4040, q[127] = 0x3c00;  // 3 and 2^-7: 3.0078125, which BF16 would round
  q[kIndexDim] = 0xc040, q[kIndexDim + 127] = kOne;  // -2, which is not positive
  const std::vector<uint16_t> w = {kMinusTwo, kOne};
  EXPECT_EQ(index_score_bf16_twin(q.data(), w.data(), key.data(), 2), -6.015625f);
  EXPECT_EQ(index_score_bf16_twin(q.data(), w.data(), key.data(), 1), -6.015625f);
}

}  // namespace
}  // namespace hadal::ops
