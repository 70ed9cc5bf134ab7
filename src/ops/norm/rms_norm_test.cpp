#include "ops/norm/rms_norm.h"

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;

TEST(RmsNorm, KernelKeepsTheContract) {
  at::manual_seed(1);
  const auto call = [](const Tensors& in) { return Tensors{rms_norm(in[0], in[1], 1e-6)}; };
  for (const int64_t dim : {1, 16, 67, 384}) {
    const at::Tensor x = at::randn({7, dim}), weight = at::randn({dim});
    testing::check_kernel("rms_norm fp32", call, {x, weight}, 1, 1e-6);
    testing::check_kernel("rms_norm bf16", call, {x.to(at::kBFloat16), weight}, 1, 4e-3);
  }
}

TEST(RmsNorm, HeadNormKernelKeepsTheContract) {
  at::manual_seed(2);
  const auto call = [](const Tensors& in) {
    return Tensors{head_norm(in[0], 1e-6, Numerics::kIdeal)};
  };
  testing::check_kernel("head_norm fp32", call, {at::randn({5, 3, 96})}, 1, 1e-6);
  testing::check_kernel("head_norm bf16", call, {at::randn({5, 3, 96}).to(at::kBFloat16)}, 1, 4e-3);
}

TEST(RmsNorm, OutputHasUnitMeanSquareWhateverTheScale) {
  at::manual_seed(3);
  const at::Tensor x = at::randn({4, 64}), ones = at::ones({64});
  const at::Tensor y = rms_norm(x, ones, 0.0);
  EXPECT_LT((y.square().mean(1) - 1.0).abs().max().item<double>(), 1e-6);
  // A power of two changes no bit: every intermediate is scaled exactly.
  EXPECT_TRUE(testing::same_bits(rms_norm(x * 1024.0, ones, 0.0), y));
  EXPECT_TRUE(testing::same_bits(rms_norm(-x, ones, 0.0), -y));
}

TEST(RmsNorm, ZerosStayZero) {
  EXPECT_TRUE(at::equal(rms_norm(at::zeros({2, 8}), at::ones({8}), 1e-6), at::zeros({2, 8})));
}

// model.md 4, every rounding by itself.
TEST(RmsNorm, ReleasedHeadNormRoundsEachStep) {
  at::manual_seed(4);
  const at::Tensor q = (at::randn({9, 2, 128}) * 3.0).to(at::kBFloat16);
  const auto bf16 = [](const at::Tensor& x) { return x.to(at::kBFloat16).to(at::kDouble); };
  const at::Tensor qd = q.to(at::kDouble);
  const at::Tensor mean = bf16(bf16(qd * qd).mean(2, /*keepdim=*/true));
  const at::Tensor expected = (qd * bf16(1.0 / at::sqrt(bf16(mean + 1e-6)))).to(at::kBFloat16);
  const at::Tensor found = head_norm(q, 1e-6, Numerics::kReleased);
  // The mean in FP32 and in FP64 may round to neighbouring BF16 values now and then.
  const double equal = (found == expected).to(at::kDouble).mean().item<double>();
  EXPECT_GE(equal, 0.9);
  testing::expect_machine_independent(
      [](const Tensors& in) { return Tensors{head_norm(in[0], 1e-6, Numerics::kReleased)}; }, {q});
  const at::Tensor plain = head_norm(q, 1e-6, Numerics::kBf16);
  EXPECT_LT((plain == expected).to(at::kDouble).mean().item<double>(), equal);
}

}  // namespace
}  // namespace hadal::ops
