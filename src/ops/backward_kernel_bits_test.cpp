// Backward passes of the CPU's own kernels: the same bits for every instruction set and number of
// threads, and near the gradient of the reference in float64.
#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "ops/attention/rope.h"
#include "ops/attention/sparse_attn.h"
#include "ops/indexer/hadamard.h"
#include "ops/indexer/index_kl.h"
#include "ops/indexer/index_scores.h"
#include "ops/loss/cross_entropy.h"
#include "ops/mhc/hyper_connection.h"
#include "ops/moe/balance.h"
#include "ops/moe/swiglu.h"
#include "ops/norm/rms_norm.h"
#include "ops/rows/gather.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using Tensors = std::vector<at::Tensor>;
/// Inputs to outputs; runs in the type of the inputs.
using Op = std::function<Tensors(const Tensors&)>;

at::Tensor random(at::IntArrayRef shape) { return at::randn(shape, at::kDouble); }

/// Gradients of all inputs for given gradients of the outputs.
Tensors gradients(const Op& op, const Tensors& inputs, const Tensors& grads) {
  const at::AutoGradMode enable(true);
  Tensors leaves;
  for (const at::Tensor& input : inputs)
    leaves.push_back(input.detach().clone().requires_grad_(true));
  const Tensors outputs = op(leaves);
  Tensors roots, root_grads;
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (!outputs[i].requires_grad()) continue;
    roots.push_back(outputs[i]);
    root_grads.push_back(grads[i].to(outputs[i].scalar_type()));
  }
  return torch::autograd::grad(roots, leaves, root_grads);
}

/// `tolerances` are of FP32 and BF16 (0: not tried), relative to the largest entry of a gradient.
/// The first `narrow` inputs are BF16 then, the rest stay FP32.
void check(const char* name,
           const Op& op,
           const Tensors& inputs,
           size_t narrow,
           double fp32_tolerance,
           double bf16_tolerance) {
  Tensors grads;
  {
    const at::NoGradGuard no_grad;
    for (const at::Tensor& output : op(inputs)) grads.push_back(at::randn_like(output));
  }
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const double tolerance = type == at::kFloat ? fp32_tolerance : bf16_tolerance;
    if (tolerance == 0.0) continue;
    Tensors given, exact;
    for (size_t i = 0; i < inputs.size(); ++i) {
      given.push_back(inputs[i].to(i < narrow ? type : at::kFloat));
      exact.push_back(given.back().to(at::kDouble));
    }
    // Gradients of outputs that both can hold.
    Tensors out_grads;
    for (const at::Tensor& grad : grads) out_grads.push_back(grad.to(type));
    Tensors wide_grads;
    for (const at::Tensor& grad : out_grads) wide_grads.push_back(grad.to(at::kDouble));
    const Tensors expected = gradients(op, exact, wide_grads);
    const Tensors found = testing::expect_machine_independent(
        [&](const Tensors& in) { return gradients(op, in, out_grads); }, given);
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_TRUE(found[i].defined()) << name << ", input " << i;
      const double size = expected[i].abs().max().item<double>();
      const double error = (found[i].to(at::kDouble) - expected[i]).abs().max().item<double>();
      EXPECT_LE(error, tolerance * size) << name << ", input " << i << ", " << type;
      EXPECT_GT(size, 0.0) << name << ", input " << i;
    }
  }
}

class BackwardBits : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(21); }
};

TEST_F(BackwardBits, Norms) {
  check(
      "rms_norm", [](const Tensors& in) { return Tensors{rms_norm(in[0], in[1], 1e-6)}; },
      {random({300, 37}), random({37})}, 1, 2e-6, 5e-3);
  check(
      "head_norm",
      [](const Tensors& in) { return Tensors{head_norm(in[0], 1e-6, Numerics::kIdeal)}; },
      {random({20, 3, 40})}, 1, 2e-6, 5e-3);
}

TEST_F(BackwardBits, Rope) {
  const RopeTable table(6, 10000.0, nullptr);
  const at::Tensor cos_sin = table.cos_sin(at::tensor({0, 3, 1000}, at::kLong), 1000);
  for (const bool inverse : {false, true}) {
    check(
        "rope", [&](const Tensors& in) { return Tensors{rope(in[0], cos_sin, inverse)}; },
        {random({3, 2, 10})}, 1, 1e-6, 5e-3);
  }
}

TEST_F(BackwardBits, Hadamard) {
  check(
      "hadamard", [](const Tensors& in) { return Tensors{hadamard(in[0])}; }, {random({5, 32})}, 1,
      1e-6, 5e-3);
}

TEST_F(BackwardBits, Swiglu) {
  const auto weighted = [](const Tensors& in) { return Tensors{swiglu(in[0], in[1], in[2], 1.5)}; };
  check("swiglu", weighted, {random({9, 45}), random({9, 45}), random({9})}, 2, 2e-6, 5e-3);
  const auto plain = [](const Tensors& in) { return Tensors{swiglu(in[0], in[1], {}, 1.5)}; };
  check("swiglu without weight", plain, {random({9, 45}), random({9, 45})}, 2, 2e-6, 5e-3);
}

TEST_F(BackwardBits, HyperConnections) {
  const auto pre = [](const Tensors& in) {
    const HcPre r = hc_pre(in[0], in[1], in[2], in[3], {});
    return Tensors{r.mixed, r.post, r.comb};
  };
  check("hc_pre", pre,
        {random({261, 4, 25}), random({24, 100}) * 0.1, random({24}), random({3}) * 0.5}, 1, 2e-5,
        1e-2);
  const auto head = [](const Tensors& in) {
    return Tensors{hc_head(in[0], in[1], in[2], in[3], {})};
  };
  check("hc_head", head, {random({261, 4, 25}), random({4, 100}) * 0.1, random({4}), random({1})},
        1, 1e-5, 1e-2);
  const auto post = [](const Tensors& in) { return Tensors{hc_post(in[0], in[1], in[2], in[3])}; };
  check("hc_post", post,
        {random({21, 25}), random({21, 4, 25}), random({21, 4}), random({21, 4, 4})}, 2, 2e-6,
        5e-3);
}

TEST_F(BackwardBits, CrossEntropy) {
  const at::Tensor targets = at::randint(-1, 70, {301}, at::kLong);
  // Pieces of one chunk, of two, and the whole are one tree.
  for (const int64_t chunk : {128, 300, 4096}) {
    check(
        "cross entropy",
        [&](const Tensors& in) {
          return Tensors{linear_cross_entropy(in[0], in[1], targets, chunk)};
        },
        {random({301, 24}), random({70, 24})}, 2, 2e-6, 1e-2);
  }
}

TEST_F(BackwardBits, CrossEntropyIsTheSameWhateverThePieces) {
  const at::Tensor targets = at::randint(-1, 70, {700}, at::kLong);
  const Tensors inputs{random({700, 24}).to(at::kFloat), random({70, 24}).to(at::kFloat)};
  const auto run = [&](int64_t chunk) {
    return gradients(
        [&](const Tensors& in) {
          return Tensors{linear_cross_entropy(in[0], in[1], targets, chunk)};
        },
        inputs, {at::ones({})});
  };
  const Tensors whole = run(4096);
  for (const int64_t chunk : {1, 128, 511, 512}) {
    const Tensors pieces = run(chunk);
    for (size_t i = 0; i < 2; ++i) {
      EXPECT_TRUE(testing::same_bits(pieces[i], whole[i])) << chunk;
    }
  }
}

// Three samples, the second too short for a block.
class IndexerBackward : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(23); }
  Batch batch_{{150, 3, 41}, {0, 0, 0}, at::kCPU};
  const int64_t blocks_ = batch_.blocks(4).num_blocks();
};

TEST_F(IndexerBackward, ScoresAreNearTheReference) {
  check(
      "index scores",
      [&](const Tensors& in) {
        const at::Tensor scores =
            index_scores(in[0], in[1], step_blocks(in[2], batch_, 4), batch_, 4, Numerics::kIdeal);
        return Tensors{scores.masked_fill(scores.isinf(), 0.0)};
      },
      {random({194, 3, 32}), random({194, 3}), random({blocks_, 32})}, 3, 2e-6, 1e-2);
}

TEST_F(IndexerBackward, KlIsNearTheReference) {
  const at::Tensor q = random({194, 3, 20}), keys = random({blocks_, 20}),
                   lse = random({194, 3}) + 5.0;
  at::Tensor selection = at::full({194, 6}, -1, at::kInt);
  for (int64_t t = 0; t < 194; ++t) {
    const int64_t visible = (batch_.host_pos()[static_cast<size_t>(t)] + 1) / 4;
    const int64_t count = std::min<int64_t>(visible, 6);
    selection[t]
        .narrow(0, 0, count)
        .copy_(std::get<0>(at::randperm(visible, at::kInt).narrow(0, 0, count).sort()));
  }
  const at::Tensor hidden =
      at::arange(37, at::kLong).unsqueeze(0) >= batch_.visible(4).to(at::kLong).unsqueeze(1);
  for (const at::Tensor& chosen : {at::Tensor(), selection}) {
    check(
        "index kl",
        [&](const Tensors& in) {
          const at::ScalarType type = in[0].scalar_type();
          return Tensors{index_kl(in[0].masked_fill(hidden, -INFINITY), chosen, q.to(type),
                                  step_blocks(keys.to(type), batch_, 4), lse.to(type), batch_, 4,
                                  0.3)
                             .sum};
        },
        {random({194, 37})}, 0, 5e-6, 0.0);
  }
}

TEST_F(BackwardBits, BalanceLoss) {
  const at::Tensor chosen = at::randint(0, 90, {5}, at::kLong);
  const at::Tensor share = random({300, 5}).abs().to(at::kFloat).requires_grad_(true);
  const at::Tensor loss = balance_loss(share, share_sums(share), chosen, 300, 2);
  const at::Tensor f = chosen.to(at::kDouble) * (5.0 / 600.0);
  EXPECT_NEAR(loss.item<double>(),
              (f * share.detach().to(at::kDouble).mean(0)).sum().item<double>(), 1e-5);
  const at::Tensor grad = torch::autograd::grad({loss * 3.0}, {share})[0].to(at::kDouble);
  EXPECT_LE((grad - f * (3.0 / 300.0)).abs().max().item<double>(), 1e-7);
}

// A sum over places is the sum of its halves, also where a half has nothing of it.
TEST_F(BackwardBits, GatheredRowsAreSumsOfSubtrees) {
  const at::Tensor rows = at::randint(0, 40, {1024}, at::kLong),
                   grad = random({1024, 9}).to(at::kFloat);
  rows.narrow(0, 512, 512).clamp_max_(30);
  const auto gradient = [&](int64_t begin, int64_t count) {
    const at::Tensor table = at::zeros({40, 9}).requires_grad_(true);
    return torch::autograd::grad({gather_rows(table, rows.narrow(0, begin, count))}, {table},
                                 {grad.narrow(0, begin, count)})[0];
  };
  const at::Tensor whole = gradient(0, 1024);
  EXPECT_TRUE(testing::same_bits(whole, gradient(0, 512) + gradient(512, 512)));
  EXPECT_FALSE(testing::same_bits(whole, gradient(0, 384) + gradient(384, 640)));
  const at::Tensor expected =
      at::zeros({40, 9}, at::kDouble).index_add_(0, rows, grad.to(at::kDouble));
  EXPECT_LE((whole.to(at::kDouble) - expected).abs().max().item<double>(), 2e-5);
}

struct AttentionCase {
  const char* name;
  int64_t window, ratio, topk;  // topk 0: every visible block
};

class AttentionBackward : public ::testing::TestWithParam<AttentionCase> {};

TEST_P(AttentionBackward, IsNearTheReference) {
  at::manual_seed(22);
  const AttentionCase& c = GetParam();
  const Batch batch({150, 41, 3}, {0, 0, 0}, at::kCPU);
  const AttentionParams params{.window = c.window, .scale = 0.3, .ratio = c.ratio};
  at::Tensor selection;
  if (c.topk > 0) {
    selection = at::full({194, c.topk}, -1, at::kInt);
    for (int64_t t = 0; t < 194; ++t) {
      const int64_t visible = (batch.host_pos()[static_cast<size_t>(t)] + 1) / c.ratio;
      const int64_t count = std::min(visible, c.topk);
      const at::Tensor some = at::randperm(visible, at::kInt).narrow(0, 0, count);
      selection[t].narrow(0, 0, count).copy_(std::get<0>(some.sort()));
    }
  }
  Tensors inputs{random({194, 3, 20}), random({194, 20}), random({3})};
  if (c.ratio > 0)
    inputs.insert(inputs.begin() + 2, random({batch.blocks(c.ratio).num_blocks(), 20}));
  const auto attend = [&](const Tensors& in) {
    BlockView blocks;
    if (c.ratio > 0) blocks = step_blocks(in[2], batch, c.ratio);
    return Tensors{sparse_attn(in[0], in[1], {}, blocks, selection, in.back(), batch, params).out};
  };
  check(c.name, attend, inputs, inputs.size() - 1, 1e-5, 2e-2);
}

INSTANTIATE_TEST_SUITE_P(Cases,
                         AttentionBackward,
                         ::testing::Values(AttentionCase{"window", 32, 0, 0},
                                           AttentionCase{"wide", 128, 16, 0},
                                           AttentionCase{"dense", 8, 2, 0},
                                           AttentionCase{"selected", 16, 4, 5}),
                         [](const auto& c) { return std::string(c.param.name); });

}  // namespace
}  // namespace hadal::ops
