#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "ops/attention/sparse_attn_sm90.h"
#include "testing/attention_data.h"

namespace hadal::ops {
namespace {

using testing::attention_twin;
using testing::AttentionResults;
using testing::AttentionShape;
using testing::AttentionWorld;

double bf16_value(uint16_t bits) {
  return static_cast<double>(std::bit_cast<float>(static_cast<uint32_t>(bits) << 16));
}

/// Channel d of a latent, as numerics.md has it.
double channel(const uint8_t* row, int64_t d, const AttentionShape& shape) {
  const int64_t rounded = shape.format == AttnRows::kBf16 ? 0 : shape.width - kAttnRotary;
  if (d >= rounded) {
    uint16_t bits;
    std::memcpy(&bits, row + rounded + 2 * (d - rounded), 2);
    return bf16_value(bits);
  }
  const int field = row[d] >> 3 & 15, fraction = row[d] & 7;
  const double magnitude =
      field == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, field - 10);
  const int scale = row[rounded + 2 * kAttnRotary + d / 64];
  return std::ldexp((row[d] & 0x80) != 0 ? -magnitude : magnitude, scale - 127);
}

/// Attention of a head without any rounding.
std::vector<double> exact(const AttentionWorld& w, int64_t token, int64_t head) {
  const auto rows = w.list(token);
  const int64_t width = w.shape.width;
  const uint16_t* q = w.q.data() + (token * w.shape.heads + head) * width;
  std::vector<double> logits, out(static_cast<size_t>(width));
  double max = -std::numeric_limits<double>::infinity();
  for (const uint8_t* row : rows) {
    double dot = 0;
    for (int64_t d = 0; row != nullptr && d < width; ++d)
      dot += bf16_value(q[d]) * channel(row, d, w.shape);
    logits.push_back(dot * static_cast<double>(AttentionWorld::kScale));
    if (row != nullptr) max = std::max(max, logits.back());
  }
  double sum = std::exp(static_cast<double>(w.sink[static_cast<size_t>(head)]) - max);
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] == nullptr) continue;
    const double weight = std::exp(logits[i] - max);
    sum += weight;
    for (int64_t d = 0; d < width; ++d)
      out[static_cast<size_t>(d)] += weight * channel(rows[i], d, w.shape);
  }
  for (double& value : out) value /= sum;
  return out;
}

void expect_attention(const AttentionWorld& w, int64_t token, int64_t head) {
  const AttentionResults found = attention_twin(w, token, head, 1);
  const std::vector<double> expected = exact(w, token, head);
  double largest = 0, error = 0;
  for (size_t d = 0; d < expected.size(); ++d) {
    largest = std::max(largest, std::fabs(expected[d]));
    error = std::max(error, std::fabs(expected[d] - bf16_value(found.out[d])));
  }
  EXPECT_LT(error / largest, 4e-3)
      << w.shape.width << " channels, token " << token << " head " << head;
}

TEST(SparseAttnTwin, IsAttentionWithASink) {
  const AttentionWorld w({5, 2, 128, 1700}, 5);
  for (const int64_t token : {0, 1, 4}) {
    for (const int64_t head : {0, 1}) expect_attention(w, token, head);
  }
}

TEST(SparseAttnTwin, IsAttentionOfEveryWidth) {
  for (int64_t width = 64; width <= 512; width += 64) {
    for (const AttnRows format : {AttnRows::kPacked, AttnRows::kBf16}) {
      const AttentionWorld w({1, 3, 64, 100, width, format}, static_cast<unsigned>(width));
      expect_attention(w, 0, 2);
    }
  }
}

TEST(SparseAttnTwin, PackedRowsAreTheBf16RowsTheyHold) {
  for (const int64_t width : {64, 128, 320}) {
    const AttentionShape shape{1, 2, 64, 70, width};
    const AttentionWorld packed(shape, 8);
    AttentionWorld dense = packed;
    dense.shape.format = AttnRows::kBf16;
    for (auto rows : {&AttentionWorld::window, &AttentionWorld::blocks}) {
      std::vector<uint8_t>& to = dense.*rows;
      const std::vector<uint8_t>& from = packed.*rows;
      to.clear();
      for (size_t at = 0; at < from.size(); at += static_cast<size_t>(shape.row_bytes())) {
        for (int64_t d = 0; d < width; ++d) {
          const auto exact = static_cast<float>(channel(from.data() + at, d, shape));
          const auto all = std::bit_cast<uint32_t>(exact);
          const uint32_t bits = (all + 0x7fff + (all >> 16 & 1)) >> 16;  // rounds subnormals alone
          to.push_back(static_cast<uint8_t>(bits));
          to.push_back(static_cast<uint8_t>(bits >> 8));
        }
      }
    }
    EXPECT_EQ(digest(attention_twin(dense, 0, 0, 2)), digest(attention_twin(packed, 0, 0, 2)))
        << width;
  }
}

/// The twin over some latents, with a sink of 0.5.
AttentionResults over(const AttentionWorld& w, const std::vector<const uint8_t*>& rows) {
  const float sink = 0.5f;
  AttentionResults r{std::vector<uint16_t>(kLatentDim), std::vector<float>(2)};
  sparse_attn_twin({w.q.data(), &sink, rows.data(), 1, static_cast<int64_t>(rows.size()),
                    AttentionWorld::kScale, r.out.data(), r.stats.data()});
  return r;
}

TEST(SparseAttnTwin, PlacesWithoutARowChangeNothingWhereTheyStand) {
  const AttentionWorld w({1, 1, 0, 200}, 6);
  const std::vector<const uint8_t*> list = w.list(0);
  const uint64_t alone = digest(over(w, list));
  auto padded = list;
  padded.resize(250, nullptr);
  EXPECT_EQ(digest(over(w, padded)), alone);
  for (const int64_t before : {kAttnChunk, 3 * kAttnChunk, kAttnSegment, 2 * kAttnSegment}) {
    std::vector<const uint8_t*> later(static_cast<size_t>(before), nullptr);
    later.insert(later.end(), list.begin(), list.end());
    EXPECT_EQ(digest(over(w, later)), alone) << before << " places before";
  }
}

TEST(SparseAttnTwin, HasTheBitsOfACard) {
  for (const testing::GoldenAttention& g : testing::kGoldenAttention) {
    const AttentionWorld w(g.shape, g.seed);
    EXPECT_EQ(digest(attention_twin(w, 0, 0, g.shape.heads)), g.digest) << "seed " << g.seed;
  }
}

TEST(SparseAttnTwin, AnEmptyListGivesZeros) {
  const AttentionWorld w({1, 1, 0, 64}, 7);
  for (const size_t places : {0, 70}) {
    const AttentionResults r = over(w, std::vector<const uint8_t*>(places));
    EXPECT_EQ(r.out, std::vector<uint16_t>(kLatentDim));
    EXPECT_EQ(r.stats[0], -std::numeric_limits<float>::infinity());
    EXPECT_EQ(r.stats[1], 0.0f);
  }
}

}  // namespace
}  // namespace hadal::ops
