#include "ops/gemm/sm90_matrices.h"

#include <tuple>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/gemm/sm90_random.h"
#include "ops/gemm/weight.h"
#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

using testing::fp8;
using testing::make_fp8;
using testing::near_fp4;
using testing::same_bits;
using testing::Stored;

TEST(Sm90Matrices, HoldTheValuesOfTheirCodes) {
  for (const auto& [out, in] : {std::tuple{70, 160}, {64, 128}, {200, 96}, {129, 512}}) {
    const Stored a = near_fp4(out, in, 8), b = make_fp8(out, in + 5, 9);
    const auto four = pack_sm90_fp4({a.data, a.data}, {a.scale, a.scale});
    const auto eight = pack_sm90_fp8({b.data}, {b.scale});
    ASSERT_TRUE(four && eight) << out << " " << in;
    EXPECT_TRUE(same_bits(unpack_sm90(*four, 1), a.values)) << out << " " << in;
    EXPECT_TRUE(same_bits(unpack_sm90(*eight, 0), b.values)) << out << " " << in;
  }
  for (const auto& [out, in] : {std::tuple{64, 128}, {192, 640}}) {
    const Stored b = make_fp8(out, in, 9);
    const auto widened = pack_sm90_widened({b.data, b.data}, {b.scale, b.scale});
    ASSERT_TRUE(widened) << out << " " << in;
    EXPECT_TRUE(same_bits(unpack_sm90(*widened, 1), b.values)) << out << " " << in;
    EXPECT_FALSE(widened->rounds_rows());
  }
  for (const auto& [out, in] : {std::tuple{1, 8}, {70, 160}, {128, 64}}) {
    const at::Tensor values = at::randn({2, out, in}).to(at::kBFloat16);
    EXPECT_TRUE(same_bits(unpack_sm90(*pack_sm90_bf16(values), 1), values[1])) << out << " " << in;
  }
}

TEST(Sm90Matrices, HoldFourAndEightBitsAWeight) {
  const int64_t weights = 256 * 512;
  const auto four = pack_sm90_fp4({near_fp4(256, 512, 1).data}, {near_fp4(256, 512, 1).scale});
  // Tiles of 64 x 128: half a byte a weight, and four bytes for a row's four scales.
  EXPECT_EQ(four->num_bytes(), weights / 2 + weights / 128 * 4);
  const Stored b = make_fp8(256, 512, 1);
  EXPECT_EQ(pack_sm90_fp8({b.data}, {b.scale})->num_bytes(), weights + 2 * 4 * 4);
}

TEST(Sm90Matrices, RandomOnesAreFiniteDifferentAndOfTheAskedSize) {
  for (const auto& [format, widened] : {std::tuple{WeightFormat::kFp8, false},
                                        {WeightFormat::kFp8, true},
                                        {WeightFormat::kFp4, false},
                                        {WeightFormat::kBf16, false}}) {
    const Sm90Matrices w = random_sm90(
        {.format = format, .widened = widened, .matrices = 2, .out = 128, .in = 1024, .seed = 3},
        at::kCPU);
    const at::Tensor a = unpack_sm90(w, 0).to(at::kFloat), b = unpack_sm90(w, 1).to(at::kFloat);
    EXPECT_TRUE(a.isfinite().all().item<bool>());
    EXPECT_FALSE(at::equal(a, b));
    EXPECT_NEAR(a.mean().item<double>(), 0.0, 0.002);
    const double deviation = a.std().item<double>() * 32;  // of sums of 1,024 products
    EXPECT_GT(deviation, 0.5);
    EXPECT_LT(deviation, 2.0);
  }
  EXPECT_THROW(random_sm90({.out = 100, .in = 1024}, at::kCPU), Error);
}

TEST(Sm90Matrices, RefuseWhatTheyCannotHold) {
  Stored s = near_fp4(40, 128, 1);
  s.scale[3][1] = static_cast<uint8_t>(s.scale[3][0].item<int>() + 15);
  EXPECT_FALSE(pack_sm90_fp4({s.data}, {s.scale}).has_value());  // too far apart
  s.scale[3][1] = 20;
  EXPECT_FALSE(pack_sm90_fp4({s.data}, {s.scale}).has_value());  // too small
  s.data[3].narrow(0, 16, 16).fill_(0x80);                       // zeros need no scale
  EXPECT_TRUE(pack_sm90_fp4({s.data}, {s.scale}).has_value());
  Stored nan = make_fp8(40, 200, 1);
  nan.data.view(at::kByte)[7][9] = 0xff;
  EXPECT_FALSE(pack_sm90_fp8({nan.data}, {nan.scale}).has_value());
  EXPECT_FALSE(pack_sm90_bf16(at::zeros({8, 12}, at::kBFloat16)).has_value());
  Stored large = make_fp8(64, 128, 1);
  large.scale[0][0] = 127 + 8;
  EXPECT_TRUE(pack_sm90_fp8({large.data}, {large.scale}).has_value());
  EXPECT_FALSE(pack_sm90_widened({large.data}, {large.scale}).has_value());
  for (const auto& [out, in] : {std::tuple{40, 128}, {64, 96}}) {
    const Stored odd = make_fp8(out, in, 1);
    EXPECT_FALSE(pack_sm90_widened({odd.data}, {odd.scale}).has_value());
  }
  Stored wide = make_fp8(40, 200, 1);
  wide.scale[0][1] = 255;
  EXPECT_FALSE(pack_sm90_fp8({wide.data}, {wide.scale}).has_value());
}

TEST(Sm90Matrices, AHalfOfZerosLeavesTheOtherHalfItsScale) {
  for (const int64_t first : {0, 64}) {
    Stored b = make_fp8(128, 128, 3);
    b.data.view(at::kByte).narrow(0, first, 64).zero_();
    b.scale.fill_(119);
    const StoredCodes codes = panel_codes(fp8(b), 0);
    EXPECT_TRUE(at::equal(codes.scale, b.scale)) << first;
    EXPECT_TRUE(same_bits(Weight(fp8(b)).to_sm90(OfficialStorage::kFp8)->values(0),
                          unpack_panels(fp8(b))[0]));
  }
}

}  // namespace
}  // namespace hadal::ops
