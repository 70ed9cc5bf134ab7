// linear_cross_entropy on the GPU against its reference.
#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/loss/cross_entropy.h"
#include "testing/gpu.h"

namespace hadal::ops {
namespace {

struct Case {
  int64_t tokens, dim, vocab, chunk;
};

class CrossEntropyGpu : public ::testing::TestWithParam<Case> {};

TEST_P(CrossEntropyGpu, MatchesReference) {
  const Case& c = GetParam();
  at::manual_seed(5);
  const auto bf16 = at::device(at::kCUDA).dtype(at::kBFloat16);
  const at::Tensor hidden = at::randn({c.tokens, c.dim}, bf16);
  const at::Tensor head = at::randn({c.vocab, c.dim}, bf16) * 0.1;
  // One token in about five is not scored.
  const at::Tensor draw = at::randint(0, c.vocab, {c.tokens}, bf16.dtype(at::kLong));
  const at::Tensor targets = at::where(draw % 5 == 0, -at::ones_like(draw), draw);
  // The logits' gradient is rounded to BF16 once before its two products.
  hadal::testing::check_gpu_case(
      "linear_cross_entropy bf16 [" + std::to_string(c.tokens) + ", " + std::to_string(c.vocab) +
          "]",
      [&](const auto& in) {
        return std::vector{linear_cross_entropy(in[0], in[1], targets, c.chunk)};
      },
      {hidden, head}, 1e-2,
      4.0 * static_cast<double>(c.tokens) * static_cast<double>(c.vocab) *
          static_cast<double>(sizeof(float)));
}

TEST(CrossEntropyRowsGpu, UnscoredTokensHaveNoLossAndNoGradient) {
  const auto bf16 = at::device(at::kCUDA).dtype(at::kBFloat16);
  const at::Tensor hidden = at::randn({6, 16}, bf16), head = at::randn({8, 16}, bf16);
  const at::Tensor targets = at::full({6}, -1, bf16.dtype(at::kLong));
  const auto results = hadal::testing::run_with_gradients(
      [&](const auto& in) { return std::vector{linear_cross_entropy(in[0], in[1], targets)}; },
      {hidden, head}, {at::ones({}, bf16.dtype(at::kFloat))});
  for (const at::Tensor& result : results) EXPECT_EQ(result.abs().max().item<float>(), 0.0f);
}

INSTANTIATE_TEST_SUITE_P(Sizes,
                         CrossEntropyGpu,
                         ::testing::Values(Case{37, 64, 100, 16},
                                           Case{16384, 384, 8192, 4096},
                                           Case{4096, 1024, 129280, 2048}));

}  // namespace
}  // namespace hadal::ops
