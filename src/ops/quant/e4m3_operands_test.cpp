#include "ops/quant/e4m3_operands.h"

#include <cmath>
#include <limits>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/quant/round_trip.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

/// Values of every size, zeros of both signs and whole groups of zeros.
at::Tensor hard_values(int64_t rows, int64_t width, at::ScalarType type) {
  at::Tensor x =
      at::randn({rows, width}) * at::exp2(at::randint(-60, 40, {rows, width}).to(at::kFloat));
  x[0].zero_();
  x.select(1, width - 1).zero_();
  x[rows - 1][0] = -0.0;
  return x.to(type);
}

/// Values agree, -0 being 0.
bool same_values(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && at::equal(a.isnan(), b.isnan()) &&
         at::equal(at::nan_to_num(a), at::nan_to_num(b));
}

class E4m3Operands : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override { at::manual_seed(6); }
};

TEST_P(E4m3Operands, RowsAreTheReferencesOnEveryMachine) {
  for (const auto& [rows, width] : {std::pair{3, 128}, {5, 300}, {130, 64}, {2, 1}, {7, 513}}) {
    const at::Tensor x = hard_values(rows, width, GetParam());
    const auto run = [](const std::vector<at::Tensor>& in) {
      return std::vector{e4m3_rows(in[0], 128)};
    };
    const at::Tensor found = testing::expect_machine_independent(run, {x})[0];
    EXPECT_TRUE(same_values(found, reference::e4m3_rows(x, 128))) << rows << " " << width;
  }
}

TEST_P(E4m3Operands, ColumnsAreTheReferencesOnEveryMachine) {
  const std::vector<int64_t> bounds = {0, 1, 1, 129, 140, 200};
  for (const int64_t width : {1, 16, 70, 64, 200}) {
    const at::Tensor x = hard_values(200, width, GetParam());
    const auto run = [&](const std::vector<at::Tensor>& in) {
      return std::vector{e4m3_columns(in[0], bounds)};
    };
    const at::Tensor found = testing::expect_machine_independent(run, {x})[0];
    EXPECT_TRUE(same_values(found, reference::e4m3_columns(x, bounds))) << width;
  }
}

INSTANTIATE_TEST_SUITE_P(Types,
                         E4m3Operands,
                         ::testing::Values(at::kFloat, at::kBFloat16),
                         [](const auto& type) {
                           return type.param == at::kFloat ? "FP32" : "BF16";
                         });

TEST(E4m3, IsTheRoundTripOfActivationsAboveItsFloor) {
  at::manual_seed(2);
  const at::Tensor x = at::randn({64, 512}).to(at::kBFloat16);
  EXPECT_TRUE(same_values(e4m3_rows(x, 128), fp8_round_trip(x, 128)));
  EXPECT_FALSE(same_values(e4m3_rows(x * 1e-7, 128), fp8_round_trip(x * 1e-7, 128)));
}

TEST(E4m3, ScalesAreTheSmallestPowersThatDoNotSaturate) {
  // 448 2^k has scale 2^k and is the largest code; the next BF16 value has the next scale.
  for (const int k : {-117, -60, -9, 0, 3, 100}) {
    const float top = std::ldexp(448.0f, k), above = std::ldexp(450.0f, k);
    for (const float amax : {top, above}) {
      at::Tensor x = at::zeros({1, 128});
      x[0][0] = amax;
      x[0][1] = std::ldexp(1.0f, k - 9);     // the least code of scale 2^k
      x[0][2] = std::ldexp(1.0f, k - 10);    // half of it: to even, zero
      x[0][3] = std::ldexp(1.125f, k - 10);  // more than half of it
      const at::Tensor y = e4m3_rows(x.to(at::kBFloat16), 128).to(at::kFloat);
      EXPECT_EQ(y[0][0].item<float>(), top) << k;
      EXPECT_EQ(y[0][1].item<float>(), amax == top ? std::ldexp(1.0f, k - 9) : 0.0f) << k;
      EXPECT_EQ(y[0][2].item<float>(), 0.0f) << k;
      EXPECT_EQ(y[0][3].item<float>(), amax == top ? std::ldexp(1.0f, k - 9) : 0.0f) << k;
    }
  }
}

TEST(E4m3, TinyAndZeroGroupsKeepTheFloorsScale) {
  at::Tensor x = at::zeros({2, 128});
  x[1][0] = 0x1p-126f;
  x[1][1] = 0x1p-140f;  // a subnormal
  const at::Tensor y = e4m3_rows(x, 128);
  EXPECT_EQ(y[0].abs().max().item<float>(), 0.0f);
  EXPECT_EQ(y[1][0].item<float>(), 0x1p-126f);
  EXPECT_EQ(y[1][1].item<float>(), 0.0f);
}

TEST(E4m3, AGroupThatIsNotFiniteIsNanThroughoutAndNoOther) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
        -std::numeric_limits<float>::infinity()}) {
    for (const auto type : {at::kFloat, at::kBFloat16}) {
      at::Tensor x = at::ones({140, 300});
      x[130][140] = bad;
      const auto run = [](const std::vector<at::Tensor>& in) {
        return std::vector{e4m3_rows(in[0], 128), e4m3_columns(in[0], {0, 128, 140})};
      };
      const std::vector<at::Tensor> y = testing::expect_machine_independent(run, {x.to(type)});
      EXPECT_EQ(y[0].isnan().sum().item<int64_t>(), 128);
      EXPECT_TRUE(y[0][130].narrow(0, 128, 128).isnan().all().item<bool>());
      EXPECT_EQ(y[1].isnan().sum().item<int64_t>(), 12);
      EXPECT_TRUE(y[1].select(1, 140).narrow(0, 128, 12).isnan().all().item<bool>());
      EXPECT_TRUE(same_values(y[0], reference::e4m3_rows(x.to(type), 128)));
      EXPECT_TRUE(same_values(y[1], reference::e4m3_columns(x.to(type), {0, 128, 140})));
      // Activations: NaN stays where it is, infinity takes its group.
      const at::Tensor forward = fp8_round_trip(x.narrow(1, 0, 256).to(type), 128);
      EXPECT_EQ(forward.isnan().sum().item<int64_t>(), std::isnan(bad) ? 1 : 128);
    }
  }
}

TEST(E4m3, GroupsCoverTheRows) {
  const at::Tensor x = at::ones({10, 4});
  EXPECT_THROW(e4m3_columns(x, {0, 9}), Error);
  EXPECT_THROW(e4m3_columns(x, {0, 7, 5, 10}), Error);
  EXPECT_THROW(e4m3_rows(x, 0), Error);
}

}  // namespace
}  // namespace hadal::ops
