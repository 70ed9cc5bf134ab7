#include "ops/gemm/panels.h"

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/gemm/weight.h"
#include "testing/kernel_checks.h"
#include "testing/stored_weights.h"

namespace hadal::ops {
namespace {

using testing::fp4;
using testing::fp8;
using testing::make_fp4;
using testing::make_fp8;
using testing::near_fp4;
using testing::same_bits;
using testing::Stored;

TEST(Panels, GiveTheirValuesBack) {
  const Stored a = make_fp4(150, 96, 8), b = make_fp8(150, 77, 9);
  EXPECT_TRUE(same_bits(unpack_panels(fp4(a))[0], a.values));
  EXPECT_TRUE(same_bits(unpack_panels(fp8(b))[0], b.values));
  const at::Tensor w = at::randn({3, 70, 33});
  EXPECT_TRUE(same_bits(unpack_panels(pack_panels(w)), w));
  EXPECT_TRUE(same_bits(unpack_panels(pack_panels(w.to(at::kBFloat16))), w.to(at::kBFloat16)));
}

TEST(Panels, HoldFourAndEightBitsAWeight) {
  const int64_t weights = 256 * 512;
  EXPECT_EQ(fp4(make_fp4(256, 512, 1)).num_bytes(), weights / 2 + weights / 32);
  EXPECT_EQ(fp8(make_fp8(256, 512, 1)).num_bytes(), weights + 256 / 64 * 4);
}

TEST(Panels, RefuseValuesWithoutAPackedForm) {
  Stored s = make_fp4(40, 64, 1);
  s.scale[3][1] = 20;
  EXPECT_FALSE(pack_fp4({s.data}, {s.scale}).has_value());
  s.data[3].narrow(0, 16, 16).fill_(0x80);  // zeros need no scale
  EXPECT_TRUE(pack_fp4({s.data}, {s.scale}).has_value());
  Stored wide = make_fp8(40, 200, 1);
  wide.scale[0][1] = 255;
  EXPECT_FALSE(pack_fp8({wide.data}, {wide.scale}).has_value());
  Stored nan = make_fp8(40, 200, 1);
  nan.data.view(at::kByte)[7][9] = 0xff;
  EXPECT_FALSE(pack_fp8({nan.data}, {nan.scale}).has_value());
}

TEST(Panels, TakeFp8ScalesOfAnyValue) {
  at::manual_seed(3);
  const Stored s = make_fp8(200, 300, 4);
  at::Tensor scale = at::rand({2, 3}) * 0.01 - 0.002;
  scale[0][1] = 0.0;
  const auto panels = pack_fp8({s.data}, {scale});
  ASSERT_TRUE(panels.has_value());
  EXPECT_TRUE(panels->has_factors());
  EXPECT_EQ(panels->num_bytes(), 208 * 304 + 4 * 3 * 4);
  const at::Tensor spread =
      scale.repeat_interleave(128, 0).repeat_interleave(128, 1).narrow(0, 0, 200).narrow(1, 0, 300);
  EXPECT_TRUE(at::equal(unpack_panels(*panels)[0], s.data.to(at::kFloat) * spread));
  const StoredCodes codes = panel_codes(*panels, 0);
  EXPECT_TRUE(at::equal(codes.data.view(at::kByte), s.data.view(at::kByte)));
  EXPECT_TRUE(at::equal(codes.scale, scale));
  EXPECT_FALSE(Weight(*panels).to_sm90(OfficialStorage::kFp8).has_value());
  for (const float bad : {0x1p-61f, 0x1p61f, -0x1p61f}) {
    at::Tensor wide = scale.clone();
    wide[1][2] = bad;
    EXPECT_FALSE(pack_fp8({s.data}, {wide}).has_value()) << bad;
  }
  EXPECT_THROW(pack_fp8({s.data, s.data}, {scale, s.scale}), Error);
}

TEST(Panels, GiveTheirCodesBack) {
  const Stored a = near_fp4(70, 96, 2), b = make_fp8(200, 77, 3);
  const StoredCodes four = panel_codes(fp4(a), 0), eight = panel_codes(fp8(b), 0);
  EXPECT_TRUE(at::equal(four.data, a.data));
  at::Tensor scale = a.scale.clone();
  scale[1][0] = 127;  // of the zeros
  EXPECT_TRUE(at::equal(four.scale, scale));
  EXPECT_TRUE(at::equal(eight.data.view(at::kByte), b.data.view(at::kByte)));
  EXPECT_TRUE(at::equal(eight.scale, b.scale));
}

}  // namespace
}  // namespace hadal::ops
