#include "ops/rows/embedding.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/parallel.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

TEST(Embedding, CopiesRows) {
  at::manual_seed(1);
  const at::Tensor table = at::randn({6, 4}).to(at::kBFloat16);
  const at::Tensor out = ops::embedding(at::tensor({5, 0, 5}, at::kLong), table);
  EXPECT_TRUE(testing::same_bits(out[0], table[5]));
  EXPECT_TRUE(testing::same_bits(out[1], table[0]));
  EXPECT_TRUE(testing::same_bits(out[2], table[5]));
}

TEST(Embedding, RefusesIdsOutsideTheTable) {
  const at::Tensor table = at::randn({6, 4});
  EXPECT_THROW(ops::embedding(at::tensor({0, 6}, at::kLong), table), Error);
  EXPECT_THROW(ops::embedding(at::tensor({-1}, at::kLong), table), Error);
}

// The gradient is a sum in token order whatever the threads: 1e8 + 1 - 1e8 tells the order.
TEST(Embedding, GradientSumsInTokenOrder) {
  const at::Tensor ids = at::tensor({2, 2, 1, 2}, at::kLong);
  const at::Tensor table = at::zeros({4, 1}).requires_grad_(true);
  const at::Tensor grad_out = at::tensor({1e8f, 1.0f, 7.0f, -1e8f}).reshape({4, 1});
  for (const int threads : {1, 3}) {
    set_num_threads(threads);
    const at::Tensor grad =
        torch::autograd::grad({ops::embedding(ids, table)}, {table}, {grad_out})[0];
    EXPECT_EQ(grad[2].item<float>(), (1e8f + 1.0f) + -1e8f);
    EXPECT_EQ(grad[1].item<float>(), 7.0f);
    EXPECT_EQ(grad[0].item<float>(), 0.0f);
    EXPECT_EQ(grad[3].item<float>(), 0.0f);
  }
  set_num_threads(2);
}

// Many tokens of few rows: the sums of BF16 gradients are FP32 sums, rounded once.
TEST(Embedding, Bf16GradientIsRoundedOnce) {
  at::manual_seed(2);
  const at::Tensor ids = at::randint(3, {500}, at::kLong);
  const at::Tensor table = at::zeros({3, 8}, at::kBFloat16).requires_grad_(true);
  const at::Tensor grad_out = at::randn({500, 8}).to(at::kBFloat16);
  const at::Tensor grad =
      torch::autograd::grad({ops::embedding(ids, table)}, {table}, {grad_out})[0];
  const at::Tensor exact =
      at::zeros({3, 8}, at::kDouble).index_add(0, ids, grad_out.to(at::kDouble));
  EXPECT_LT(((grad.to(at::kDouble) - exact) / exact).abs().max().item<double>(), 0.0041);
}

}  // namespace
}  // namespace hadal::ops
