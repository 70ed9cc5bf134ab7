#include <cmath>
#include <random>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/exact_math.h"
#include "ops/moe/gate.h"
#include "ops/moe/gate_sm90.h"

namespace hadal::ops {
namespace {

TEST(ExactMath, IsTheCLibrarysWithinOneUnit) {
  std::mt19937_64 random(1);
  const auto uniform = [&] { return static_cast<double>(random() >> 11) * 0x1p-53; };
  double worst = 0.0;
  const auto compare = [&](double found, double expected) {
    worst = std::max(worst, std::fabs(found - expected) / std::fabs(expected));
  };
  for (int i = 0; i < 200'000; ++i) {
    const double x = uniform() * 120.0 - 100.0, y = std::ldexp(0.5 + uniform(), i % 120 - 60);
    compare(exp64(x), std::exp(x));
    compare(log64(y), std::log(y));
    const double near = 1.0 - std::ldexp(uniform(), -1 - i % 40);
    if (near != 1.0) compare(log64(near), std::log(near));
  }
  EXPECT_LT(worst, 3e-16);
}

/// As the twin's integers: experts and weights of the CPU's op.
TEST(GateTwin, HasTheBitsOfTheCpuOnSomeHundredThousandLogits) {
  at::manual_seed(1);
  constexpr int64_t kTokens = 500, kExperts = 256, kTopk = 6;
  const at::Tensor logits = at::randn({kTokens, kExperts}) * 6.0,
                   bias = at::randn({kExperts}) * 0.2;
  for (const bool hashed : {false, true}) {
    at::Tensor ids = at::randint(0, 40, {kTokens}, at::kLong),
               table = at::empty({40, kTopk}, at::kLong);
    for (int64_t row = 0; row < 40; ++row)
      table[row].copy_(at::randperm(kExperts).narrow(0, 0, kTopk));
    at::Tensor experts = at::empty({kTokens, kTopk}, at::kInt),
               weights = at::empty({kTokens, kTopk});
    gate_twin({.logits = logits.const_data_ptr<float>(),
               .bias = hashed ? nullptr : bias.const_data_ptr<float>(),
               .table = table.const_data_ptr<int64_t>(),
               .ids = ids.const_data_ptr<int64_t>(),
               .experts = experts.mutable_data_ptr<int32_t>(),
               .weights = weights.mutable_data_ptr<float>(),
               .tokens = kTokens,
               .num_experts = kExperts,
               .topk = kTopk,
               .scale = 1.5f});
    const Routing expected = hashed ? gate_fixed(logits, table.index_select(0, ids), 1.5)
                                    : gate(logits, bias, kTopk, 1.5);
    EXPECT_TRUE(at::equal(experts.to(at::kLong), expected.experts));
    EXPECT_TRUE(at::equal(weights, expected.weights));
  }
}

}  // namespace
}  // namespace hadal::ops
