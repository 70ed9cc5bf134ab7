#include "ops/moe/swiglu.h"

#include <cmath>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

double one(double gate, double up, double limit) {
  return swiglu(at::full({1, 1}, gate, at::kDouble), at::full({1, 1}, up, at::kDouble), {}, limit)
      .item<double>();
}

double silu(double x) { return x / (1.0 + std::exp(-x)); }

TEST(Swiglu, ClampsUpOnBothSidesAndGateFromAboveAlone) {
  EXPECT_NEAR(one(0.7, 1.3, 10.0), silu(0.7) * 1.3, 1e-15);
  EXPECT_NEAR(one(25.0, 1.0, 10.0), silu(10.0), 1e-14);
  EXPECT_NEAR(one(1.0, 25.0, 10.0), silu(1.0) * 10.0, 1e-14);
  EXPECT_NEAR(one(1.0, -25.0, 10.0), silu(1.0) * -10.0, 1e-14);
  // A gate far below is not clamped: silu(-25) is 25 e^-25, silu(-10) would be a million times
  // more.
  EXPECT_NEAR(one(-25.0, 1.0, 10.0), silu(-25.0), 1e-24);
}

TEST(Swiglu, TheRoutingWeightIsAFactor) {
  at::manual_seed(1);
  const at::Tensor gate = at::randn({4, 9}, at::kDouble), up = at::randn({4, 9}, at::kDouble),
                   weight = at::randn({4}, at::kDouble);
  EXPECT_LT((swiglu(gate, up, weight, 2.0) - swiglu(gate, up, {}, 2.0) * weight.unsqueeze(1))
                .abs()
                .max()
                .item<double>(),
            1e-15);
}

TEST(Swiglu, GradientIsZeroWhereAClampActs) {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    const at::Tensor gate =
        at::tensor({3.0, 1.0, 1.0, 3.0, -9.0, 1.0}).reshape({1, 6}).to(type).requires_grad_(true);
    const at::Tensor up =
        at::tensor({1.0, 4.0, -4.0, 4.0, 1.0, 1.5}).reshape({1, 6}).to(type).requires_grad_(true);
    const auto grads =
        torch::autograd::grad({swiglu(gate, up, {}, 2.0)}, {gate, up}, {at::ones({1, 6}).to(type)});
    const std::vector<bool> gate_moves = {false, true, true, false, true, true},
                            up_moves = {true, false, false, false, true, true};
    for (int64_t i = 0; i < 6; ++i) {
      EXPECT_EQ(grads[0][0][i].item<double>() != 0.0, gate_moves[static_cast<size_t>(i)]) << i;
      EXPECT_EQ(grads[1][0][i].item<double>() != 0.0, up_moves[static_cast<size_t>(i)]) << i;
    }
  }
}

// model.md 11.2: the weight's gradient is <dOut, activation before it>.
TEST(Swiglu, WeightGradientIsTheUnweightedActivation) {
  at::manual_seed(2);
  const at::Tensor gate = at::randn({3, 8}), up = at::randn({3, 8}), seed = at::randn({3, 8});
  const at::Tensor weight = at::randn({3}).requires_grad_(true);
  const at::Tensor grad =
      torch::autograd::grad({swiglu(gate, up, weight, 1.5)}, {weight}, {seed})[0];
  EXPECT_TRUE(at::allclose(grad, (seed * swiglu(gate, up, {}, 1.5)).sum(1), 1e-5, 1e-6));
}

TEST(Swiglu, KernelKeepsTheContract) {
  at::manual_seed(3);
  for (const int64_t width : {1, 16, 77}) {
    const at::Tensor gate = at::randn({9, width}) * 4.0, up = at::randn({9, width}) * 4.0,
                     weight = at::rand({9});
    const auto weighted = [](const Tensors& in) {
      return Tensors{swiglu(in[0], in[1], in[2], 5.0)};
    };
    const auto plain = [](const Tensors& in) { return Tensors{swiglu(in[0], in[1], {}, 5.0)}; };
    testing::check_kernel("swiglu fp32", plain, {gate, up}, 2, 1e-6);
    testing::check_kernel("swiglu weighted fp32", weighted, {gate, up, weight}, 3, 1e-6);
    testing::check_kernel("swiglu weighted bf16", weighted,
                          {gate.to(at::kBFloat16), up.to(at::kBFloat16), weight}, 3, 4e-3);
  }
}

TEST(Swiglu, FarGatesAreFinite) {
  const at::Tensor gate = at::tensor({-1e4f, -104.0f, -88.0f, 0.0f}).reshape({1, 4});
  const at::Tensor y = swiglu(gate, at::ones({1, 4}), {}, 10.0);
  EXPECT_TRUE(at::isfinite(y).all().item<bool>()) << y;
  // The kernel's exponential ends at e^88, so that a far gate leaves less than 1e-30 instead of 0.
  EXPECT_LT(std::abs(y[0][0].item<float>()), 1e-30f);
}

}  // namespace
}  // namespace hadal::ops
