#include "ops/moe/gate.h"

#include <cmath>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

std::vector<int64_t> experts_of(const Routing& routing, int64_t token) {
  std::vector<int64_t> result;
  for (int64_t k = 0; k < routing.experts.size(1); ++k) {
    result.push_back(routing.experts[token][k].item<int64_t>());
  }
  return result;
}

TEST(Gate, WeightsAreNormalisedAffinitiesOfTheChosen) {
  at::manual_seed(1);
  const at::Tensor logits = at::randn({20, 9}) * 3.0;
  const Routing routing = gate(logits, at::zeros({9}), 4, 1.5);
  EXPECT_LT((routing.weights.sum(1) - 1.5).abs().max().item<double>(), 1e-6);
  for (int64_t t = 0; t < 20; ++t) {
    double sum = 0.0;
    for (const int64_t e : experts_of(routing, t)) {
      sum += std::sqrt(std::log1p(std::exp(logits[t][e].item<double>())));
    }
    const std::vector<int64_t> chosen = experts_of(routing, t);
    EXPECT_TRUE(std::is_sorted(chosen.begin(), chosen.end()));
    for (size_t k = 0; k < chosen.size(); ++k) {
      const double affinity = std::sqrt(std::log1p(std::exp(logits[t][chosen[k]].item<double>())));
      EXPECT_NEAR(routing.weights[t][static_cast<int64_t>(k)].item<double>(), 1.5 * affinity / sum,
                  1e-6);
    }
  }
}

TEST(Gate, TheBiasOnlyChooses) {
  const at::Tensor logits = at::tensor({4.0f, 3.0f, 2.0f, 1.0f}).reshape({1, 4});
  const Routing plain = gate(logits, at::zeros({4}), 2, 1.0);
  EXPECT_EQ(experts_of(plain, 0), (std::vector<int64_t>{0, 1}));
  // A bias that changes no choice changes nothing.
  const Routing same = gate(logits, at::tensor({0.5f, 0.1f, -0.2f, -0.3f}), 2, 1.0);
  EXPECT_TRUE(testing::same_bits(same.weights, plain.weights));
  // One that does leaves the weights to the affinities of the new choice.
  const Routing moved = gate(logits, at::tensor({0.0f, 0.0f, 0.0f, 9.0f}), 2, 1.0);
  EXPECT_EQ(experts_of(moved, 0), (std::vector<int64_t>{0, 3}));
  const double a = std::sqrt(std::log1p(std::exp(4.0))), b = std::sqrt(std::log1p(std::exp(1.0)));
  EXPECT_NEAR(moved.weights[0][1].item<double>(), b / (a + b), 1e-6);
  EXPECT_TRUE(testing::same_bits(moved.affinity, plain.affinity));
}

TEST(Gate, TiesGoToTheLowerExpertAndNanIsLowest) {
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const auto pick = [&](std::vector<float> logits, std::vector<float> bias, int64_t k) {
      const auto n = static_cast<int64_t>(logits.size());
      return experts_of(gate(at::tensor(logits).reshape({1, n}).to(type), at::tensor(bias), k, 1.0),
                        0);
    };
    EXPECT_EQ(pick({1, 1, 1, 1, 1}, {0, 0, 0, 0, 0}, 3), (std::vector<int64_t>{0, 1, 2}));
    EXPECT_EQ(pick({0, 2, 1, 2, 2}, {0, 0, 0, 0, 0}, 2), (std::vector<int64_t>{1, 3}));
    EXPECT_EQ(pick({NAN, 0, NAN, -9, -8}, {0, 0, 0, 0, 0}, 3), (std::vector<int64_t>{1, 3, 4}));
    EXPECT_EQ(pick({3, 3, 3, 3, 3}, {0, NAN, 0, 0, 0}, 3), (std::vector<int64_t>{0, 2, 3}));
  }
}

TEST(Gate, SoftplusIsItsArgumentAboveTwenty) {
  const at::Tensor x = at::tensor({-50.0, -1.0, 0.0, 19.0, 20.5, 700.0}, at::kDouble);
  const at::Tensor y = sqrt_softplus(x);
  EXPECT_NEAR(y[0].item<double>(), std::sqrt(std::exp(-50.0)), 1e-20);
  EXPECT_NEAR(y[2].item<double>(), std::sqrt(std::log(2.0)), 1e-15);
  EXPECT_EQ(y[4].item<double>(), std::sqrt(20.5));
  EXPECT_EQ(y[5].item<double>(), std::sqrt(700.0));
}

TEST(Gate, HashedRoutingTakesTheGivenExperts) {
  at::manual_seed(2);
  const at::Tensor logits = at::randn({3, 6});
  const at::Tensor experts = at::tensor({5, 0, 2, 1, 4, 3}, at::kLong).reshape({3, 2});
  const Routing routing = gate_fixed(logits, experts, 2.5);
  EXPECT_EQ(experts_of(routing, 0), (std::vector<int64_t>{0, 5}));
  EXPECT_EQ(experts_of(routing, 1), (std::vector<int64_t>{1, 2}));
  // The same as learned routing that happens to choose them.
  at::Tensor bias = at::zeros({6});
  bias[0] = bias[5] = 100.0;
  const Routing learned = gate(logits.narrow(0, 0, 1), bias, 2, 2.5);
  EXPECT_TRUE(testing::same_bits(learned.weights[0], routing.weights[0]));
}

TEST(Gate, KernelKeepsTheContract) {
  at::manual_seed(3);
  const at::Tensor logits = at::randn({70, 13}) * 4.0, bias = at::randn({13}) * 0.3;
  testing::check_kernel(
      "gate",
      [&](const Tensors& in) {
        const Routing r = gate(in[0], bias, 3, 1.5);
        return Tensors{r.weights, r.affinity, r.experts};
      },
      {logits}, 1, 1e-6);
  const at::Tensor fixed = at::stack(
      {at::arange(70, at::kLong).remainder(13), at::arange(5, 75, at::kLong).remainder(13)}, 1);
  testing::check_kernel(
      "gate_fixed",
      [](const Tensors& in) {
        const Routing r = gate_fixed(in[0], in[1], 1.5);
        return Tensors{r.weights, r.affinity, r.experts};
      },
      {logits, fixed}, 2, 1e-6);
}

// The kernel's gradient is that of the reference for the experts the kernel chose.
TEST(Gate, KernelGradientIsClose) {
  at::manual_seed(4);
  const at::Tensor logits = at::randn({6, 8}), bias = at::randn({8}), seed = at::randn({6, 3});
  const auto grad = [&](at::ScalarType type) {
    const at::Tensor leaf = logits.to(type).requires_grad_(true);
    return torch::autograd::grad({gate(leaf, bias, 3, 1.5).weights}, {leaf}, {seed.to(type)})[0];
  };
  EXPECT_LT((grad(at::kFloat) - grad(at::kDouble)).abs().max().item<double>(), 2e-6);
}

TEST(Gate, RefusesMoreExpertsThanThereAre) {
  EXPECT_THROW(gate(at::zeros({1, 4}), at::zeros({4}), 5, 1.0), Error);
}

}  // namespace
}  // namespace hadal::ops
