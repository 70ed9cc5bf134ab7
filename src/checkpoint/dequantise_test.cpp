#include "checkpoint/dequantise.h"

#include <cmath>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

namespace hadal::checkpoint {
namespace {

TEST(Dequantise, EveryScaleByte) {
  const at::Tensor values = e8m0_to_float(at::arange(256, at::kByte));
  for (int b = 0; b < 255; ++b) {
    ASSERT_EQ(static_cast<double>(values[b].item<float>()), std::ldexp(1.0, b - 127)) << b;
  }
  EXPECT_TRUE(std::isnan(values[255].item<float>()));
}

TEST(Dequantise, Fp4NibbleOrderAndScales) {
  // One row of 64: byte i holds codes 2i mod 16 (low) and 2i + 1 mod 16 (high); scales 2^0 and 2^3.
  at::Tensor data = at::empty({1, 32}, at::kByte);
  for (int i = 0; i < 32; ++i) data[0][i] = (2 * i % 16) | ((2 * i + 1) % 16) << 4;
  const at::Tensor dense = dequantise_fp4(data, at::tensor({127, 130}, at::kByte).unsqueeze(0));
  const double magnitudes[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  for (int i = 0; i < 64; ++i) {
    const int code = i % 16;
    const double expected = (code & 8 ? -1 : 1) * magnitudes[code & 7] * (i < 32 ? 1 : 8);
    EXPECT_EQ(dense[0][i].item<double>(), expected) << i;
  }
}

TEST(Dequantise, Fp8BlocksOddSizes) {
  at::manual_seed(1);
  const at::Tensor codes = at::randn({200, 130}).to(at::kFloat8_e4m3fn);
  const at::Tensor scale = at::tensor({120, 127, 130, 128}, at::kByte).reshape({2, 2});
  const at::Tensor dense = dequantise_fp8(codes, scale);
  for (const auto& [row, column] :
       {std::pair{0, 0}, {127, 127}, {127, 128}, {128, 0}, {199, 129}}) {
    const double factor = std::ldexp(1.0, scale[row / 128][column / 128].item<int>() - 127);
    EXPECT_EQ(dense[row][column].item<double>(),
              codes.to(at::kFloat)[row][column].item<double>() * factor);
  }
  EXPECT_TRUE(at::equal(dense.to(at::kBFloat16).to(at::kFloat), dense)) << "not exact in BF16";
}

}  // namespace
}  // namespace hadal::checkpoint
