#include "ops/quant/round_trip.h"

#include <cmath>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

/// Nearest of `values` to x by exhaustive search; ties go to the even index.
double nearest(const std::vector<double>& values, double x) {
  size_t best = 0;
  for (size_t i = 1; i < values.size(); ++i) {
    const double d = std::abs(values[i] - x), b = std::abs(values[best] - x);
    if (d < b || (d == b && i % 2 == 0)) best = i;
  }
  return values[best];
}

std::vector<double> e4m3_magnitudes() {
  std::vector<double> values;
  for (int code = 0; code < 127; ++code) {
    const int exponent = code >> 3, mantissa = code & 7;
    values.push_back(exponent == 0 ? std::ldexp(mantissa, -9)
                                   : std::ldexp(8 + mantissa, exponent - 10));
  }
  return values;
}

// Every finite BF16 value as the largest of its group, next to smaller ones: against the text of
// model.md 14.2, 14.3.
void check_all_bf16(int64_t group, bool fp4) {
  const std::vector<double> e2m1 = {0, 0.5, 1, 1.5, 2, 3, 4, 6}, e4m3 = e4m3_magnitudes();
  const double largest = fp4 ? 6.0 : 448.0;
  const at::Tensor bits = at::arange(0, 65536, at::kInt).to(at::kShort);
  const at::Tensor all = bits.view(at::kBFloat16);
  const at::Tensor finite = all.index({at::isfinite(all)});
  at::Tensor x = at::zeros({finite.size(0), group}, at::kBFloat16);
  x.select(1, 0).copy_(finite);
  at::manual_seed(1);
  const at::Tensor fraction = at::rand({finite.size(0), group - 1}) * 2 - 1;
  x.narrow(1, 1, group - 1).copy_(finite.to(at::kFloat).unsqueeze(1) * fraction);
  const at::Tensor y = fp4 ? fp4_round_trip(x, group) : fp8_round_trip(x, group);
  const at::Tensor xd = x.to(at::kDouble).contiguous(), yd = y.to(at::kDouble).contiguous();
  const double* xp = xd.data_ptr<double>();
  const double* yp = yd.data_ptr<double>();
  int64_t wrong = 0;
  for (int64_t row = 0; row < x.size(0); ++row) {
    float amax = fp4 ? 6.0f * std::ldexp(1.0f, -126) : 1e-4f;
    for (int64_t i = 0; i < group; ++i) {
      amax = std::max(amax, static_cast<float>(std::abs(xp[row * group + i])));
    }
    const float ratio = amax * static_cast<float>(1.0f / static_cast<float>(largest));
    int exponent = 0;
    const float fraction_part = std::frexp(ratio, &exponent);  // ratio = f * 2^e, f in [0.5, 1)
    const double scale = std::ldexp(1.0, fraction_part == 0.5f ? exponent - 1 : exponent);
    for (int64_t i = 0; i < group; ++i) {
      const double value = xp[row * group + i];
      const double magnitude = std::min(std::abs(value) / scale, largest);
      double expected = std::copysign(nearest(fp4 ? e2m1 : e4m3, magnitude) * scale, value);
      // Rounding up within a factor 2^-3 of the largest BF16 value overflows, as the arithmetic
      // does.
      if (std::abs(expected) >= std::ldexp(1.0, 128)) expected = std::copysign(INFINITY, value);
      wrong += yp[row * group + i] != expected;
    }
  }
  EXPECT_EQ(wrong, 0) << "of " << x.numel();
}

TEST(RoundTrip, Fp8IsExactForEveryBf16) { check_all_bf16(4, false); }
TEST(RoundTrip, Fp4IsExactForEveryBf16) { check_all_bf16(4, true); }

TEST(RoundTrip, E2m1TiesGoToTheEvenCode) {
  const at::Tensor x = at::tensor({0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -5.0});
  const at::Tensor expected = at::tensor({0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.0, -4.0});
  EXPECT_TRUE(at::equal(round_to_e2m1(x), expected)) << round_to_e2m1(x);
  EXPECT_TRUE(std::signbit(round_to_e2m1(x)[8].item<double>()));
}

TEST(RoundTrip, KernelsKeepTheContract) {
  using Tensors = std::vector<at::Tensor>;
  at::manual_seed(2);
  // Rows of very different size, and one of zeros.
  const at::Tensor x =
      at::randn({7, 256}) * at::pow(10.0, at::arange(-6, 8, 2).to(at::kFloat)).unsqueeze(1);
  x[3].zero_();
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    for (const auto& [name, call] : std::vector<std::pair<const char*, testing::KernelCall>>{
             {"fp8_64", [](const Tensors& in) { return Tensors{fp8_round_trip(in[0], 64)}; }},
             {"fp8_128", [](const Tensors& in) { return Tensors{fp8_round_trip(in[0], 128)}; }},
             {"fp8_leading",
              [](const Tensors& in) { return Tensors{fp8_round_trip_leading(in[0], 192, 64)}; }},
             {"fp4_32", [](const Tensors& in) { return Tensors{fp4_round_trip(in[0], 32)}; }}}) {
      SCOPED_TRACE(name);
      const at::Tensor rows = x.to(type);
      const at::Tensor once = testing::expect_machine_independent(call, {rows})[0];
      testing::expect_row_independent(call, {rows}, 1);
      // Values of the grid are on the grid: a second trip changes no bit.
      EXPECT_TRUE(testing::same_bits(call({once})[0], once));
      // Odd in x, but for the sign of zero, which the kernels do not keep.
      EXPECT_TRUE(at::equal(call({-rows})[0], -once));
      // What it returns is exact in BF16.
      EXPECT_TRUE(at::equal(once.to(at::kBFloat16).to(type), once) ||
                  std::string(name) == "fp8_leading");
    }
  }
}

TEST(RoundTrip, LeadingLeavesTheRest) {
  at::manual_seed(3);
  const at::Tensor x = at::randn({5, 192}).to(at::kBFloat16);
  const at::Tensor y = fp8_round_trip_leading(x, 128, 64);
  EXPECT_TRUE(testing::same_bits(y.narrow(1, 128, 64), x.narrow(1, 128, 64)));
  EXPECT_TRUE(testing::same_bits(y.narrow(1, 0, 128), fp8_round_trip(x.narrow(1, 0, 128), 64)));
}

TEST(RoundTrip, GradientIsStraightThrough) {
  at::Tensor x = at::randn({3, 64}).requires_grad_(true);
  const at::Tensor weight = at::randn({3, 64});
  (fp8_round_trip(x, 64) * weight).sum().backward();
  EXPECT_TRUE(at::equal(x.grad(), weight));
}

}  // namespace
}  // namespace hadal::ops
