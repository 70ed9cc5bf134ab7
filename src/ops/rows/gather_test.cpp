#include "ops/rows/gather.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

namespace hadal::ops {
namespace {

TEST(GatherDistinctRows, AgreesWithGatherRows) {
  at::manual_seed(3);
  const at::Tensor x = at::randn({7, 2, 3}).requires_grad_(true);
  const at::Tensor rows = at::tensor({6, 0, 3}, at::kLong), grad_out = at::randn({3, 2, 3});
  const at::Tensor a = gather_rows(x, rows), b = gather_distinct_rows(x, rows);
  EXPECT_TRUE(at::equal(a, b));
  EXPECT_TRUE(at::equal(torch::autograd::grad({a}, {x}, {grad_out})[0],
                        torch::autograd::grad({b}, {x}, {grad_out})[0]));
}

}  // namespace
}  // namespace hadal::ops
