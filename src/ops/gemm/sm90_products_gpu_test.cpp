// Products of tensors on a GPU against the integer model of the matrix units, bit for bit.
#include "testing/sm90_products_cases.h"

namespace hadal::ops {
namespace {

at::Device card() { return at::kCUDA; }

INSTANTIATE_TEST_SUITE_P(RowsOnGpu, Sm90Products, ::testing::Values(1, 7, 40, 64, 300));

TEST(Sm90ProductsGpu, WithoutRows) {
  const Stored w = make_fp8(64, 128, 3), e = near_fp4(64, 128, 4);
  const at::Tensor x = at::empty({0, 128}, at::kBFloat16).to(at::kCUDA);
  const Weight eight(*pack_sm90_fp8({w.data}, {w.scale})),
      four(*pack_sm90_fp4({e.data}, {e.scale})), groups(*pack_sm90_widened({w.data}, {w.scale}));
  const std::vector<int64_t> expected = {0, 64};
  EXPECT_EQ(linear(x, eight.to(at::kCUDA), GemmRole::kFp8).sizes(), expected);
  const at::Tensor offsets = at::zeros({2}, at::device(at::kCUDA).dtype(at::kLong));
  EXPECT_EQ(grouped_linear(x, four.to(at::kCUDA), offsets, GemmRole::kFp4).sizes(), expected);
  EXPECT_EQ(group_linear(x.unsqueeze(1), groups.to(at::kCUDA)).flatten(1).sizes(), expected);
}

// A reference that was asked for, FP32 rows and gradients do not go through the kernels.
TEST(Sm90ProductsGpu, ServeNothingElse) {
  at::manual_seed(6);
  const Stored w = make_fp8(64, 128, 3);
  const Weight there = Weight(*pack_sm90_fp8({w.data}, {w.scale})).to(at::kCUDA);
  const at::Tensor x = fp8_rows(5, 128).to(at::kCUDA), values = w.values.to(at::kCUDA);
  {
    const ReferenceGuard guard;
    EXPECT_TRUE(same_bits(linear(x, there, GemmRole::kFp8).cpu(),
                          reference::linear(x, values, GemmRole::kFp8).cpu()));
  }
  const at::Tensor wide = x.to(at::kFloat);
  EXPECT_TRUE(same_bits(linear(wide, there, GemmRole::kFp8).cpu(),
                        reference::linear(wide, values, GemmRole::kFp8).cpu()));
  at::Tensor leaf = x.clone().requires_grad_(true);
  linear(leaf, there, GemmRole::kBf16).sum().backward();
  EXPECT_TRUE(leaf.grad().defined());
}

}  // namespace
}  // namespace hadal::ops
