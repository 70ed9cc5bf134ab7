#include "ops/attention/rope.h"

#include <cmath>
#include <numbers>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

/// fl32(1 / fl32(base^(2i / dim))).
float plain_frequency(double base, int64_t i, int64_t dim) {
  return 1.0f / static_cast<float>(
                    std::pow(base, 2.0 * static_cast<double>(i) / static_cast<double>(dim)));
}

// model.md 5: lo 15, hi 25; the multiplier of f_i is 1 up to 15, then falls linearly to
// 1/16.
TEST(Rope, YarnTableOfTheReleasedModels) {
  const YarnParams yarn;
  const RopeTable table(64, 160000.0, &yarn);
  ASSERT_EQ(table.frequencies().size(), 32u);
  const std::vector<std::pair<int64_t, double>> multipliers = {
      {0, 1.0},      {7, 1.0},     {15, 1.0},    {16, 0.90625}, {20, 0.53125},
      {24, 0.15625}, {25, 0.0625}, {28, 0.0625}, {31, 0.0625}};
  for (const auto& [i, multiplier] : multipliers) {
    const double found = table.frequencies()[static_cast<size_t>(i)];
    EXPECT_NEAR(found / plain_frequency(160000.0, i, 64), multiplier, 2e-7) << i;
    // The ends of the ramp are exact: times one, or divided by a power of two.
    if (multiplier == 1.0 || multiplier == 0.0625) {
      EXPECT_EQ(found, multiplier * plain_frequency(160000.0, i, 64)) << i;
    }
  }
}

TEST(Rope, YarnRampOfTheRecordedModels) {
  // Original length 256: lo 0, hi 10.
  const YarnParams yarn{.original_seq_len = 256};
  const RopeTable table(64, 160000.0, &yarn);
  for (int64_t i = 0; i < 32; ++i) {
    const double ramp = std::min(static_cast<double>(i) / 10.0, 1.0);
    EXPECT_NEAR(table.frequencies()[static_cast<size_t>(i)] / plain_frequency(160000.0, i, 64),
                ramp / 16.0 + 1.0 - ramp, 3e-7)
        << i;
  }
}

TEST(Rope, PlainTableHasNoScaling) {
  const RopeTable table(64, 10000.0, nullptr);
  for (int64_t i = 0; i < 32; ++i) {
    EXPECT_EQ(table.frequencies()[static_cast<size_t>(i)], plain_frequency(10000.0, i, 64)) << i;
  }
}

// The angle is a product rounded to FP32: at p near 10^6 that moves it by up to 2^-5.
TEST(Rope, AnglesAreRoundedToFp32BeforeTheCosine) {
  const RopeTable table(64, 10000.0, nullptr);
  const std::vector<int64_t> positions = {999983, 1000003, 1048575};
  const at::Tensor cos_sin = table.cos_sin(at::tensor(positions, at::kLong), 1048575);
  int differs = 0;
  for (size_t row = 0; row < positions.size(); ++row) {
    for (int64_t i = 0; i < 32; ++i) {
      const float f = table.frequencies()[static_cast<size_t>(i)];
      const float angle = static_cast<float>(positions[row]) * f;
      const double exact = static_cast<double>(positions[row]) * static_cast<double>(f);
      const auto found = cos_sin[static_cast<int64_t>(row)][i];
      ASSERT_EQ(found[0].item<float>(), static_cast<float>(std::cos(static_cast<double>(angle))));
      ASSERT_EQ(found[1].item<float>(), static_cast<float>(std::sin(static_cast<double>(angle))));
      differs += std::abs(std::cos(exact) - found[0].item<double>()) > 1e-4;
    }
  }
  EXPECT_GT(differs, 10);
}

TEST(Rope, TableDoesNotDependOnTheCall) {
  const RopeTable table(16, 10000.0, nullptr);
  const at::Tensor many = at::arange(0, 3000, at::kLong);
  const at::Tensor whole = table.cos_sin(many, 2999);
  const at::Tensor few = table.cos_sin(many.narrow(0, 1500, 3), 1502);
  EXPECT_TRUE(testing::same_bits(whole.narrow(0, 1500, 3), few));
  EXPECT_TRUE(testing::same_bits(table.cos_sin(many.narrow(0, 1500, 40), 70000),
                                 whole.narrow(0, 1500, 40)));
}

TEST(Rope, InverseUndoesIt) {
  at::manual_seed(1);
  const RopeTable table(16, 10000.0, nullptr);
  const at::Tensor cos_sin = table.cos_sin(at::arange(0, 40, at::kLong), 39).to(at::kDouble);
  const at::Tensor x = at::randn({40, 3, 24}, at::kDouble);
  const at::Tensor back = rope(rope(x, cos_sin), cos_sin, /*inverse=*/true);
  // cos and sin are FP32 values, so their squares add up to 1 within 1e-7.
  EXPECT_LT((back - x).abs().max().item<double>(), 1e-6);
  const at::Tensor single = x.to(at::kFloat), table32 = cos_sin.to(at::kFloat);
  EXPECT_LT((rope(rope(single, table32), table32, true) - single).abs().max().item<double>(), 2e-6);
}

TEST(Rope, RotatesTheLastChannelsInAdjacentPairs) {
  const float angle = 0.5f;
  const at::Tensor cos_sin =
      at::tensor({std::cos(angle), std::sin(angle)}, at::kFloat).reshape({1, 1, 2});
  const at::Tensor x = at::tensor({1.0f, 2.0f, 3.0f, 4.0f}, at::kFloat).reshape({1, 4});
  const at::Tensor y = rope(x, cos_sin);
  EXPECT_EQ(y[0][0].item<float>(), 1.0f);
  EXPECT_EQ(y[0][1].item<float>(), 2.0f);
  EXPECT_NEAR(y[0][2].item<float>(), 3 * std::cos(0.5) - 4 * std::sin(0.5), 1e-6);
  EXPECT_NEAR(y[0][3].item<float>(), 3 * std::sin(0.5) + 4 * std::cos(0.5), 1e-6);
}

// Products of rotated vectors see the distance of their positions alone.
TEST(Rope, ProductsDependOnTheDistance) {
  at::manual_seed(2);
  const RopeTable table(16, 10000.0, nullptr);
  const at::Tensor q = at::randn({1, 16}, at::kDouble), k = at::randn({1, 16}, at::kDouble);
  const auto at_pos = [&](const at::Tensor& x, int64_t pos) {
    return rope(x, table.cos_sin(at::tensor({pos}, at::kLong), pos).to(at::kDouble));
  };
  const double near = (at_pos(q, 12) * at_pos(k, 5)).sum().item<double>();
  const double far = (at_pos(q, 112) * at_pos(k, 105)).sum().item<double>();
  EXPECT_NEAR(near, far, 1e-4);
}

TEST(Rope, KernelKeepsTheContract) {
  at::manual_seed(3);
  const RopeTable table(32, 10000.0, nullptr);
  const at::Tensor cos_sin = table.cos_sin(at::arange(100, 106, at::kLong), 105);
  for (const bool inverse : {false, true}) {
    const auto call = [inverse](const Tensors& in) { return Tensors{rope(in[0], in[1], inverse)}; };
    const at::Tensor x = at::randn({6, 3, 50});
    testing::check_kernel("rope fp32", call, {x, cos_sin}, 2, 1e-6);
    testing::check_kernel("rope bf16", call, {x.to(at::kBFloat16), cos_sin}, 2, 4e-3);
  }
}

}  // namespace
}  // namespace hadal::ops
