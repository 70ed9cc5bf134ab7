#include "ops/optim/newton_schulz.h"

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

// The scalar map of model.md 17.2: a diagonal matrix keeps its directions, so each entry maps
// alone.
TEST(NewtonSchulz, ScalarTable) {
  const std::vector<double> singular = {1e-4, 3e-4, 1e-3};
  const std::vector<double> expected = {1.0020, 1.0000, 1.0000};
  // A large first entry makes the Frobenius norm 1 within 1e-6, so the others are X0's singular
  // values.
  at::Tensor diagonal = at::zeros({1, 4, 4}, at::kDouble);
  diagonal[0][0][0] = 1.0;
  for (int i = 0; i < 3; ++i) diagonal[0][i + 1][i + 1] = singular[static_cast<size_t>(i)];
  const at::Tensor x = newton_schulz(diagonal);
  for (int i = 0; i < 3; ++i) {
    EXPECT_NEAR(x[0][i + 1][i + 1].item<double>(), expected[static_cast<size_t>(i)], 1e-4);
  }
}

TEST(NewtonSchulz, IsTheSameOnEveryMachine) {
  at::manual_seed(4);
  for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{40, 40}, {57, 21}, {33, 150}}) {
    for (const bool low : {false, true}) {
      testing::expect_machine_independent(
          [low](const std::vector<at::Tensor>& inputs) {
            return std::vector<at::Tensor>{newton_schulz(inputs[0], low)};
          },
          {at::randn({3, rows, cols})});
    }
  }
}

TEST(NewtonSchulz, SingularValuesAreOne) {
  at::manual_seed(3);
  for (const auto& [rows, cols] :
       {std::pair<int64_t, int64_t>{256, 256}, {512, 128}, {128, 1024}}) {
    const at::Tensor u = at::randn({1, rows, cols});
    for (const bool low : {false, true}) {
      const at::Tensor s = at::linalg_svdvals(newton_schulz(u, low)[0]);
      const double slack = low ? 0.03 : 0.01;
      // A square Gaussian matrix has singular values near 0, which ten steps cannot lift: all but
      // the last few count.
      const int64_t counted = rows == cols ? rows - 8 : s.size(0);
      EXPECT_LT((s.narrow(0, 0, counted) - 1).abs().max().item<double>(), slack)
          << rows << "x" << cols << (low ? " bf16" : " fp32");
    }
  }
}

TEST(NewtonSchulz, BatchedEqualsAlone) {
  at::manual_seed(4);
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    for (const auto& [rows, cols] : {std::pair<int64_t, int64_t>{48, 80}, {64, 64}, {24, 256}}) {
      const at::Tensor u = at::randn({7, rows, cols}).to(type);
      const at::Tensor together = newton_schulz(u);
      for (int64_t i = 0; i < u.size(0); ++i) {
        EXPECT_TRUE(at::equal(together[i], newton_schulz(u.narrow(0, i, 1))[0]))
            << i << " of " << rows << "x" << cols << " " << type;
      }
    }
  }
}

TEST(NewtonSchulz, RotatesWithItsInput) {
  at::manual_seed(5);
  const at::Tensor u = at::randn({1, 32, 64}, at::kDouble);
  const at::Tensor q = std::get<0>(at::linalg_qr(at::randn({32, 32}, at::kDouble)));
  const at::Tensor difference = newton_schulz(at::matmul(q, u)) - at::matmul(q, newton_schulz(u));
  EXPECT_LT(difference.abs().max().item<double>(), 1e-9);
}

TEST(NewtonSchulz, ZeroStaysZero) {
  EXPECT_TRUE(at::equal(newton_schulz(at::zeros({2, 8, 4})), at::zeros({2, 8, 4})));
}

}  // namespace
}  // namespace hadal::ops
