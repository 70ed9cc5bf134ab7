#include "ops/moe/permute.h"

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

/// `topk` distinct ascending experts of `num_experts` a token; those in [2, 4) are never chosen.
at::Tensor random_experts(int64_t tokens, int64_t topk, int64_t num_experts) {
  at::Tensor experts = at::empty({tokens, topk}, at::kLong);
  for (int64_t t = 0; t < tokens; ++t) {
    const at::Tensor chosen = at::randperm(num_experts - 2, at::kLong).narrow(0, 0, topk);
    experts[t].copy_(std::get<0>(at::where(chosen >= 2, chosen + 2, chosen).sort()));
  }
  return experts;
}

TEST(Permute, SortsByExpertThenToken) {
  at::manual_seed(1);
  const at::Tensor experts = random_experts(17, 3, 9);
  const Permutation order = permute_by_expert(experts, 9);
  const at::Tensor by_pair = experts.flatten().index_select(0, order.slot);
  for (int64_t i = 1; i < 51; ++i) {
    const int64_t a = by_pair[i - 1].item<int64_t>(), b = by_pair[i].item<int64_t>();
    EXPECT_TRUE(a < b ||
                (a == b && order.token[i - 1].item<int64_t>() < order.token[i].item<int64_t>()));
  }
  EXPECT_TRUE(at::equal(order.token, order.slot.div(3, "floor")));
  EXPECT_TRUE(at::equal(order.place.index_select(0, order.slot), at::arange(51, at::kLong)));
  // Offsets count pairs; experts without tokens have empty ranges.
  ASSERT_EQ(order.offsets.size(0), 10);
  for (int64_t e = 0; e < 9; ++e) {
    const int64_t count = (experts == e).sum().item<int64_t>();
    EXPECT_EQ((order.offsets[e + 1] - order.offsets[e]).item<int64_t>(), count) << e;
    if (e == 2 || e == 3) {
      EXPECT_EQ(count, 0);
    }
  }
}

TEST(Permute, OneExpertTakesAll) {
  const Permutation order = permute_by_expert(at::full({5, 1}, 3, at::kLong), 4);
  EXPECT_TRUE(at::equal(order.offsets, at::tensor({0, 0, 0, 0, 5}, at::kLong)));
  EXPECT_TRUE(at::equal(order.token, at::arange(5, at::kLong)));
}

TEST(Permute, CombineUndoesPermuteRows) {
  at::manual_seed(2);
  const at::Tensor x = at::randn({11, 6});
  const Permutation order = permute_by_expert(random_experts(11, 4, 8), 8);
  const at::Tensor rows = permute_rows(x, order);
  EXPECT_TRUE(at::equal(rows, x.index_select(0, order.token)));
  // Four copies of a power of two add up exactly.
  EXPECT_TRUE(testing::same_bits(combine(rows, order, at::zeros({11, 6})), x * 4.0));
}

// Ascending expert, the shared expert last: values of which each order gives another sum.
TEST(Permute, CombineAddsInAscendingExpertThenShared) {
  const at::Tensor experts = at::tensor({1, 4, 6}, at::kLong).reshape({1, 3});
  const Permutation order = permute_by_expert(experts, 8);
  const at::Tensor rows = at::tensor({1e8f, -1e8f, 1.0f}).reshape({3, 1});
  const at::Tensor shared = at::tensor({3e-8f}).reshape({1, 1});
  EXPECT_EQ(combine(rows, order, shared).item<float>(), ((1e8f + -1e8f) + 1.0f) + 3e-8f);
  const at::Tensor other = at::tensor({1.0f, 1e8f, -1e8f}).reshape({3, 1});
  EXPECT_EQ(combine(other, order, shared).item<float>(), ((1.0f + 1e8f) + -1e8f) + 3e-8f);
}

TEST(Permute, CombineRoundsBf16Once) {
  const Permutation order = permute_by_expert(at::tensor({0, 1}, at::kLong).reshape({1, 2}), 2);
  // 256 + 1 + 1 is 258 in FP32; adding 1 to 256 in BF16 would stay at 256.
  const at::Tensor rows = at::tensor({256.0f, 1.0f}).reshape({2, 1}).to(at::kBFloat16);
  EXPECT_EQ(combine(rows, order, at::ones({1, 1}, at::kBFloat16)).item<float>(), 258.0f);
}

TEST(Permute, KernelKeepsTheContract) {
  at::manual_seed(3);
  const at::Tensor experts = random_experts(9, 3, 8), x = at::randn({9, 37}),
                   shared = at::randn({9, 37});
  // Rows in token order become pairs inside, so that a single token can be cut out.
  const auto call = [](const Tensors& in) {
    const Permutation order = permute_by_expert(in[2], 8);
    return Tensors{combine(permute_rows(in[0], order), order, in[1])};
  };
  testing::check_kernel("combine fp32", call, {x, shared, experts}, 3, 1e-6);
  testing::check_kernel("combine bf16", call,
                        {x.to(at::kBFloat16), shared.to(at::kBFloat16), experts}, 3, 4e-3);
}

}  // namespace
}  // namespace hadal::ops
