// Rounding by chance is unbiased, knows only the two neighbours, and depends on its key alone.
#include "train/stochastic_rounding.h"

#include <bit>
#include <cmath>
#include <limits>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::train {
namespace {

TEST(StochasticRounding, IsUnbiasedBetweenTheTwoNeighbours) {
  constexpr int64_t kDraws = 1000000;
  // A quarter of the way from 1 to its upper neighbour, and the same below zero.
  for (const float value : {1.0f + 0x1p-9f, -1.0f - 0x1p-9f}) {
    const at::Tensor rounded =
        stochastic_bf16(at::full({kDraws}, value), {.seed = 3, .step = 7, .node = 1, .element = 5})
            .to(at::kDouble);
    const double low = std::copysign(1.0, value), high = low * (1.0 + 0x1p-7);
    EXPECT_TRUE(((rounded == low) | (rounded == high)).all().item<bool>());
    const double up = (rounded == high).to(at::kDouble).mean().item<double>();
    EXPECT_NEAR(up, 0.25, 4.0 * std::sqrt(0.25 * 0.75 / kDraws));
  }
}

TEST(StochasticRounding, KeepsWhatBf16HoldsAndWhatIsNotFinite) {
  const float inf = std::numeric_limits<float>::infinity();
  const float most = std::numeric_limits<float>::max();
  const at::Tensor values = at::tensor({0.0f, -0.0f, 1.0f, -2.5f, inf, -inf, 0x1p-130f});
  EXPECT_TRUE(testing::same_bits(stochastic_bf16(values, {1, 2, 3, 4}), values.to(at::kBFloat16)));
  const at::Tensor nan = at::full({1000}, std::bit_cast<float>(0x7f800001u));
  EXPECT_TRUE(stochastic_bf16(nan, {1, 2, 3, 4}).isnan().all().item<bool>());
  EXPECT_TRUE(stochastic_bf16(at::full({1000}, most), {1, 2, 3, 4}).isfinite().all().item<bool>());
}

TEST(StochasticRounding, DependsOnItsKeyAloneNotOnThePiece) {
  at::manual_seed(1);
  const at::Tensor values = at::randn({10000});
  const RoundingKey key{.seed = 9, .step = 4, .node = 2, .element = 1024};
  const at::Tensor whole = stochastic_bf16(values, key);
  EXPECT_TRUE(testing::same_bits(whole, stochastic_bf16(values, key)));
  for (const int64_t cut : {1, 7, 4096, 9999}) {
    RoundingKey later = key;
    later.element += cut;
    EXPECT_TRUE(testing::same_bits(whole.narrow(0, cut, 10000 - cut),
                                   stochastic_bf16(values.narrow(0, cut, 10000 - cut), later)));
  }
  for (const RoundingKey& other : {RoundingKey{8, 4, 2, 1024}, RoundingKey{9, 5, 2, 1024},
                                   RoundingKey{9, 4, 3, 1024}, RoundingKey{9, 4, 2, 1023}})
    EXPECT_FALSE(at::equal(whole, stochastic_bf16(values, other)));
  const at::Tensor error = (whole.to(at::kFloat) - values).abs();
  EXPECT_TRUE((error < values.abs() * 0x1p-7f).all().item<bool>());
}

}  // namespace
}  // namespace hadal::train
