#include "ops/indexer/hadamard.h"

#include <bit>
#include <cmath>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

TEST(Hadamard, EntriesAreSylvesterSigns) {
  for (const int64_t dim : {1, 2, 32, 128}) {
    const at::Tensor h = hadamard(at::eye(dim, at::kDouble));
    for (int64_t i = 0; i < dim; ++i) {
      for (int64_t j = 0; j < dim; ++j) {
        const double sign = std::popcount(static_cast<uint64_t>(i & j)) % 2 == 0 ? 1.0 : -1.0;
        ASSERT_DOUBLE_EQ(h[i][j].item<double>(), sign / std::sqrt(static_cast<double>(dim)));
      }
    }
  }
}

TEST(Hadamard, IsItsOwnInverseAndKeepsProducts) {
  at::manual_seed(1);
  const at::Tensor x = at::randn({5, 128}, at::kDouble), y = at::randn({5, 128}, at::kDouble);
  EXPECT_LT((hadamard(hadamard(x)) - x).abs().max().item<double>(), 1e-14);
  const at::Tensor products = at::matmul(hadamard(x), hadamard(y).t());
  EXPECT_LT((products - at::matmul(x, y.t())).abs().max().item<double>(), 1e-12);
}

TEST(Hadamard, KernelKeepsTheContract) {
  at::manual_seed(2);
  const auto call = [](const Tensors& in) { return Tensors{hadamard(in[0])}; };
  for (const int64_t dim : {2, 8, 32, 128, 1024}) {
    const at::Tensor x = at::randn({6, dim});
    testing::check_kernel("hadamard fp32", call, {x}, 1, 1e-6);
    testing::check_kernel("hadamard bf16", call, {x.to(at::kBFloat16)}, 1, 4e-3);
  }
}

TEST(Hadamard, RefusesOtherWidths) { EXPECT_THROW(hadamard(at::ones({2, 24})), Error); }

}  // namespace
}  // namespace hadal::ops
