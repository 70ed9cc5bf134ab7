#include "ops/loss/cross_entropy.h"

#include <cmath>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "ops/op.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

struct Result {
  at::Tensor loss, grad_hidden, grad_head;
};

Result run(const at::Tensor& hidden,
           const at::Tensor& head,
           const at::Tensor& targets,
           int64_t chunk = 4096) {
  const at::Tensor h = hidden.detach().requires_grad_(true), w = head.detach().requires_grad_(true);
  const at::Tensor loss = linear_cross_entropy(h, w, targets, chunk);
  const auto grads = torch::autograd::grad({loss}, {h, w});
  return {loss.detach(), grads[0], grads[1]};
}

class CrossEntropy : public ::testing::Test {
 protected:
  void SetUp() override {
    at::manual_seed(1);
    hidden_ = at::randn({23, 12}, at::kDouble);
    head_ = at::randn({31, 12}, at::kDouble);
    targets_ = at::randint(31, {23}, at::kLong);
    targets_[3] = targets_[22] = -1;
  }
  at::Tensor hidden_, head_, targets_;
};

TEST_F(CrossEntropy, IsMinusLogProbability) {
  double expected = 0.0;
  for (int64_t t = 0; t < 23; ++t) {
    const int64_t target = targets_[t].item<int64_t>();
    if (target < 0) continue;
    const at::Tensor logits = at::mv(head_, hidden_[t]);
    expected += at::logsumexp(logits, {0}).item<double>() - logits[target].item<double>();
  }
  EXPECT_NEAR(run(hidden_, head_, targets_).loss.item<double>(), expected, 1e-11);
}

TEST_F(CrossEntropy, ChunksChangeRoundingAlone) {
  const Result whole = run(hidden_, head_, targets_);
  for (const int64_t chunk : {1, 5, 22, 23}) {
    const Result cut = run(hidden_, head_, targets_, chunk);
    EXPECT_NEAR(cut.loss.item<double>(), whole.loss.item<double>(), 1e-11) << chunk;
    EXPECT_TRUE(at::allclose(cut.grad_hidden, whole.grad_hidden, 1e-12, 1e-13)) << chunk;
    EXPECT_TRUE(at::allclose(cut.grad_head, whole.grad_head, 1e-12, 1e-13)) << chunk;
  }
}

TEST_F(CrossEntropy, AgreesWithTheReference) {
  const Result found = run(hidden_, head_, targets_, 7);
  const ReferenceGuard guard;
  const Result expected = run(hidden_, head_, targets_);
  EXPECT_NEAR(found.loss.item<double>(), expected.loss.item<double>(), 1e-11);
  EXPECT_TRUE(at::allclose(found.grad_hidden, expected.grad_hidden, 1e-12, 1e-13));
  EXPECT_TRUE(at::allclose(found.grad_head, expected.grad_head, 1e-12, 1e-13));
}

TEST_F(CrossEntropy, IgnoredTokensDoNothing) {
  const Result found = run(hidden_, head_, targets_);
  EXPECT_EQ(found.grad_hidden[3].abs().max().item<double>(), 0.0);
  EXPECT_EQ(found.grad_hidden[22].abs().max().item<double>(), 0.0);
  at::Tensor other = hidden_.clone();
  other[3] = 40.0;
  const Result changed = run(other, head_, targets_);
  EXPECT_EQ(changed.loss.item<double>(), found.loss.item<double>());
  EXPECT_TRUE(at::equal(changed.grad_head, found.grad_head));
  const Result none = run(hidden_, head_, at::full({23}, -1, at::kLong));
  EXPECT_EQ(none.loss.item<double>(), 0.0);
  EXPECT_EQ(none.grad_head.abs().max().item<double>(), 0.0);
}

TEST_F(CrossEntropy, UniformLogitsCostLogOfTheVocabulary) {
  const at::Tensor loss =
      linear_cross_entropy(hidden_, at::zeros({31, 12}, at::kDouble), targets_, 6);
  EXPECT_NEAR(loss.item<double>(), 21 * std::log(31.0), 1e-10);
}

TEST_F(CrossEntropy, GradientsOfATokenSumToNothingOverTheVocabulary) {
  // softmax - one-hot sums to 0: so does the head's gradient, projected on any direction.
  const Result found = run(hidden_, head_, targets_);
  EXPECT_LT(found.grad_head.sum(0).abs().max().item<double>(), 1e-12);
}

TEST_F(CrossEntropy, Fp32IsCloseAndLargeLogitsAreFinite) {
  const Result exact = run(hidden_, head_, targets_);
  const Result single = run(hidden_.to(at::kFloat), head_.to(at::kFloat), targets_);
  EXPECT_NEAR(single.loss.item<double>() / exact.loss.item<double>(), 1.0, 1e-6);
  EXPECT_LT((single.grad_head - exact.grad_head).abs().max().item<double>(), 1e-5);
  const Result large = run(hidden_.to(at::kFloat) * 1e4, head_.to(at::kFloat), targets_);
  EXPECT_TRUE(std::isfinite(large.loss.item<double>()));
  EXPECT_TRUE(at::isfinite(large.grad_hidden).all().item<bool>());
}

TEST_F(CrossEntropy, GradientScalesWithItsSeed) {
  const at::Tensor h = hidden_.clone().requires_grad_(true);
  const at::Tensor scaled =
      torch::autograd::grad({linear_cross_entropy(h, head_, targets_) / 4.0}, {h})[0];
  EXPECT_TRUE(testing::same_bits(scaled, run(hidden_, head_, targets_).grad_hidden / 4.0));
}

}  // namespace
}  // namespace hadal::ops
