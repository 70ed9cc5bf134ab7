// Rows of the caches and heads of attention on a card against the CPU's kernels one after the
// other, bit for bit.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "ops/attention/heads_sm90.h"
#include "ops/attention/rope_cpu.h"
#include "ops/cache/kv_rows.h"
#include "ops/cache/rows_sm90.h"
#include "ops/gemm/sm90_pack.h"
#include "ops/norm/rms_norm_cpu.h"
#include "ops/quant/round_trip_cpu.h"
#include "testing/float_data.h"
#include "testing/on_device.h"

namespace hadal::ops {

// In the program this stands beside the op, which needs LibTorch.
constinit CpuSlot<void(const RopeCpuParams&, int64_t, int64_t)> rope_cpu;

namespace {

using testing::differences;
using testing::normals;
using testing::normals_bf16;
using testing::OnDevice;

constexpr float kEps = 1e-6f;
constexpr uint8_t kUntouched = 0xff;

/// Values of very different sizes; some rows and some groups of 32 are zero.
std::vector<uint16_t> rows_of(int64_t rows, int64_t width, unsigned seed) {
  auto x = normals_bf16(static_cast<size_t>(rows * width), 1.0f, seed);
  std::mt19937 random(seed);
  for (int64_t first = 0; first < rows * width; first += 32) {
    const auto shift = static_cast<int>(random() % 24) - 16;
    const bool zero = random() % 16 == 0 || first / width == 2;
    for (int64_t i = first; i < first + 32; ++i) {
      uint16_t& v = x[static_cast<size_t>(i)];
      v = zero ? 0 : static_cast<uint16_t>(v + shift * 128);
    }
  }
  return x;
}

/// Places of rows in an order of its own; every fifth row has none.
std::vector<int64_t> places(int64_t rows, unsigned seed) {
  std::vector<int64_t> place(static_cast<size_t>(rows));
  std::iota(place.begin(), place.end(), 0);
  std::shuffle(place.begin(), place.end(), std::mt19937(seed));
  for (size_t i = 4; i < place.size(); i += 5) place[i] = -1;
  return place;
}

/// Packed rows at their places.
std::vector<uint8_t> pack(const std::vector<uint16_t>& rows,
                          const RowFormat& format,
                          const std::vector<int64_t>& place) {
  std::vector<uint8_t> out(place.size() * static_cast<size_t>(format.bytes()), kUntouched);
  for (size_t i = 0; i < place.size(); ++i) {
    if (place[i] < 0) continue;
    EXPECT_TRUE(pack_row(rows.data() + static_cast<int64_t>(i) * format.width, format,
                         out.data() + place[i] * format.bytes()))
        << i;
  }
  return out;
}

void rotate(std::vector<uint16_t>& x,
            const std::vector<float>& cos_sin,
            int64_t heads,
            int64_t width,
            bool inverse) {
  rope_cpu(
      {x.data(), x.data(), cos_sin.data(), heads, width, kRotaryDim, ElementType::kBf16, inverse},
      0, static_cast<int64_t>(x.size()) / (heads * width));
}

class RowsSm90 : public ::testing::TestWithParam<int64_t> {};

TEST_P(RowsSm90, LatentsHaveTheBytesOfTheCpu) {
  const int64_t rows = GetParam();
  for (int64_t width = 64; width <= 512; width += 64) {
    const auto x = rows_of(rows, width, 1);
    const auto weight = normals(static_cast<size_t>(width), 1.0f, 2);
    const auto cos_sin = testing::rotations(static_cast<size_t>(rows), 3);
    std::vector<uint16_t> row(x.size());
    rms_norm_cpu({x.data(), weight.data(), row.data(), width, kEps, ElementType::kBf16, false}, 0,
                 rows);
    rotate(row, cos_sin, 1, width, false);
    if (width > kRotaryDim) {
      fp8_round_trip_cpu(
          {row.data(), row.data(), width, width - kRotaryDim, 64, ElementType::kBf16}, 0, rows);
    }
    const auto place = places(rows, 4);
    const RowFormat format{.kind = RowKind::kLatent, .width = width, .rotary = kRotaryDim};
    // Rows of a wider product.
    std::vector<uint16_t> wide(static_cast<size_t>(rows * (width + 24)));
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(x.data() + r * width, width, wide.data() + r * (width + 24) + 24);
    const OnDevice<uint16_t> there(wide);
    const OnDevice<float> weight_there(weight), cos_sin_there(cos_sin);
    const OnDevice<int64_t> place_there(place);
    const OnDevice<uint8_t> out(static_cast<size_t>(rows * format.bytes()));
    latent_rows_sm90({there.get() + 24, weight_there.get(), cos_sin_there.get(), place_there.get(),
                      out.get(), rows, width, width + 24, kEps},
                     nullptr);
    EXPECT_EQ(differences(out.read(), pack(row, format, place)), 0) << width;
  }
}

TEST_P(RowsSm90, IndexRowsHaveTheBytesOfTheCpu) {
  const int64_t rows = GetParam(), width = 128;
  for (const int64_t heads : {1, 3}) {
    const int64_t all = rows * heads;
    const auto x = rows_of(all, width, 5);
    const auto weight = normals(static_cast<size_t>(width), 1.0f, 6);
    const auto cos_sin = testing::rotations(static_cast<size_t>(rows), 7);
    std::vector<uint16_t> row = x;
    if (heads == 1) {
      rms_norm_cpu({x.data(), weight.data(), row.data(), width, kEps, ElementType::kBf16, false}, 0,
                   all);
    }
    rotate(row, cos_sin, heads, width, false);
    hadamard_cpu({row.data(), row.data(), width, ElementType::kBf16}, 0, all);
    fp4_round_trip_cpu({row.data(), row.data(), width, width, 32, ElementType::kBf16}, 0, all);
    const auto place = places(all, 8);
    const RowFormat format{.kind = RowKind::kIndexKey, .width = width};
    const OnDevice<uint16_t> there(x);
    const OnDevice<float> weight_there(weight), cos_sin_there(cos_sin);
    const OnDevice<int64_t> place_there(place);
    const OnDevice<uint8_t> out(static_cast<size_t>(all * format.bytes()));
    index_rows_sm90({there.get(), heads == 1 ? weight_there.get() : nullptr, cos_sin_there.get(),
                     place_there.get(), out.get(), all, heads, kEps},
                    nullptr);
    EXPECT_EQ(differences(out.read(), pack(row, format, place)), 0) << heads;
  }
}

TEST_P(RowsSm90, HeadsHaveTheBitsOfTheCpu) {
  const int64_t tokens = GetParam(), heads = 3;
  for (const int64_t width : {64, 128, 256, 512}) {
    for (const bool norm : {false, true}) {
      const auto x = rows_of(tokens * heads, width, 9);
      const auto cos_sin = testing::rotations(static_cast<size_t>(tokens), 10);
      std::vector<uint16_t> expected = x;
      if (norm) {
        rms_norm_cpu({x.data(), nullptr, expected.data(), width, kEps, ElementType::kBf16, true}, 0,
                     tokens * heads);
      }
      rotate(expected, cos_sin, heads, width, !norm);
      const OnDevice<uint16_t> there(x);
      const OnDevice<float> cos_sin_there(cos_sin);
      head_rows_sm90(
          {there.get(), cos_sin_there.get(), there.get(), tokens, heads, width, kEps, norm, !norm},
          nullptr);
      EXPECT_EQ(differences(there.read(), expected), 0) << width << " norm " << norm;
    }
  }
}

TEST_P(RowsSm90, HeadsBecomeOperandsOfTheirGroups) {
  const int64_t tokens = GetParam(), heads = 6, groups = 3, row_groups = (tokens + 7) / 8 + 1;
  for (const int64_t width : {64, 128, 256, 512}) {
    auto x = rows_of(tokens * heads, width, 11);
    const auto cos_sin = testing::rotations(static_cast<size_t>(tokens), 12);
    const OnDevice<uint16_t> there(x);
    const OnDevice<float> cos_sin_there(cos_sin);
    rotate(x, cos_sin, heads, width, true);
    std::vector<uint8_t> expected;
    const int64_t values = heads / groups * width;
    for (int64_t g = 0; g < groups; ++g) {
      std::vector<uint8_t> rows(static_cast<size_t>(tokens * values * 2));
      for (int64_t t = 0; t < tokens; ++t) {
        std::memcpy(rows.data() + t * values * 2, x.data() + (t * groups + g) * values,
                    static_cast<size_t>(values * 2));
      }
      const auto operand = sm90::pack_operand(rows.data(), tokens, values * 2, row_groups);
      expected.insert(expected.end(), operand.begin(), operand.end());
    }
    const OnDevice<uint8_t> operand(expected.size());
    head_operand_sm90(
        {there.get(), cos_sin_there.get(), operand.get(), tokens, heads, width, groups, row_groups},
        nullptr);
    EXPECT_EQ(differences(operand.read(), expected), 0) << width;
  }
}

INSTANTIATE_TEST_SUITE_P(Rows, RowsSm90, ::testing::Values(1, 5, 64, 333));

}  // namespace
}  // namespace hadal::ops
