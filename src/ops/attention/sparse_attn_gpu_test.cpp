#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "ops/attention/sparse_attn.h"
#include "ops/indexer/index_scores.h"
#include "ops/indexer/index_topk.h"
#include "testing/gpu.h"

namespace hadal::ops {
namespace {

struct Case {
  const char* name;
  std::vector<int64_t> lengths;
  int64_t heads, ratio, topk;  // topk 0: every visible block
};

struct Outputs {
  at::Tensor out, lse;
  std::vector<at::Tensor> grads;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class SparseAttnGpu : public ::testing::TestWithParam<Case> {};

BlockView block_view(const Case& c, const Batch& batch, const at::Tensor& rows) {
  return c.ratio == 0 ? BlockView{} : step_blocks(rows, batch, c.ratio);
}

AttentionParams attention_params(const Case& c) {
  return {.window = 128, .scale = 0.088388, .ratio = c.ratio, .numerics = Numerics::kBf16};
}

/// Inputs in FP32 for the reference, rounded to BF16 for the kernel: the same values.
Outputs run(const Case& c,
            const Batch& batch,
            const std::vector<at::Tensor>& inputs,
            const at::Tensor& selection,
            const at::Tensor& grad_out,
            bool kernel) {
  std::vector<at::Tensor> leaves;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const at::ScalarType type = kernel && i < 3 ? at::kBFloat16 : at::kFloat;
    leaves.push_back(inputs[i].to(type).requires_grad_(true));
  }
  const AttentionResult result =
      sparse_attn(leaves[0], leaves[1], RingView{}, block_view(c, batch, leaves[2]), selection,
                  leaves[3], batch, attention_params(c));
  const std::vector<at::Tensor> wanted =
      c.ratio > 0 ? leaves : std::vector<at::Tensor>{leaves[0], leaves[1], leaves[3]};
  return {result.out, result.lse,
          torch::autograd::grad({result.out}, wanted, {grad_out.to(result.out.scalar_type())})};
}

TEST_P(SparseAttnGpu, MatchesReference) {
  const Case& c = GetParam();
  at::manual_seed(11);
  const at::Device device(at::kCUDA);
  const Batch batch(c.lengths, std::vector<int64_t>(c.lengths.size(), 0), device);
  const int64_t tokens = batch.num_tokens();
  const int64_t num_blocks = c.ratio > 0 ? batch.blocks(c.ratio).num_blocks() : 1;
  const auto random = [&](at::IntArrayRef shape) {
    return at::randn(shape, at::TensorOptions(device)).to(at::kBFloat16).to(at::kFloat);
  };
  const std::vector<at::Tensor> inputs = {random({tokens, c.heads, 128}), random({tokens, 128}),
                                          random({num_blocks, 128}), random({c.heads})};
  at::Tensor selection;
  if (c.topk > 0) {
    const int64_t columns = batch.max_end_pos() / c.ratio;
    const at::Tensor limit = (batch.pos() + 1).div(c.ratio, "floor").unsqueeze(1);
    const at::Tensor scores =
        at::rand({tokens, columns}, at::TensorOptions(device))
            .masked_fill(at::arange(columns, limit.options()) >= limit, -INFINITY);
    selection = select_topk(scores, batch, c.ratio, c.topk);
  }
  const at::Tensor grad_out = random({tokens, c.heads, 128});
  const Outputs ours = run(c, batch, inputs, selection, grad_out, true);
  const Outputs expected = run(c, batch, inputs, selection, grad_out, false);
  const double error = testing::relative_error(ours.out, expected.out);
  EXPECT_LT(error, 6e-3) << "out";
  EXPECT_LT((ours.lse - expected.lse).abs().max().item<double>(), 2e-3) << "lse";
  for (size_t i = 0; i < ours.grads.size(); ++i) {
    EXPECT_LT(testing::relative_error(ours.grads[i], expected.grads[i]), 1.2e-2)
        << "gradient " << i;
  }
  // The same bits again, and for a sequence on its own.
  const Outputs again = run(c, batch, inputs, selection, grad_out, true);
  EXPECT_TRUE(at::equal(ours.out, again.out));
  for (size_t i = 0; i < ours.grads.size(); ++i)
    EXPECT_TRUE(at::equal(ours.grads[i], again.grads[i])) << i;
  if (tokens < 30000) return;
  std::vector<at::Tensor> rounded;
  for (const at::Tensor& input : inputs) rounded.push_back(input.to(at::kBFloat16));
  const double forward_us = testing::median_us([&] {
    const at::NoGradGuard no_grad;
    sparse_attn(rounded[0], rounded[1], RingView{}, block_view(c, batch, rounded[2]), selection,
                inputs[3], batch, attention_params(c));
  });
  const double both_us =
      testing::median_us([&] { run(c, batch, inputs, selection, grad_out, true); }, 5);
  const double bytes =
      2.0 * static_cast<double>(tokens) * 128 * (2 * static_cast<double>(c.heads) + 1);
  testing::report(std::string("sparse_attn forward ") + c.name, error, forward_us, bytes);
  testing::report(std::string("sparse_attn forward+backward ") + c.name, error, both_us, 3 * bytes);
}

INSTANTIATE_TEST_SUITE_P(
    Cases,
    SparseAttnGpu,
    ::testing::Values(Case{"window", {1, 63, 300, 129}, 6, 0, 0},
                      Case{"csa_dense", {5, 200, 401}, 6, 4, 0},
                      Case{"hca", {5, 127, 128, 700}, 6, 128, 0},
                      Case{"csa_top128", {3, 700, 515}, 6, 4, 128},
                      Case{"csa_top96_16_heads", {900}, 16, 4, 96},
                      Case{"heads64", {70, 3}, 64, 4, 0},
                      Case{"window_64K", std::vector<int64_t>(16, 4096), 6, 0, 0},
                      Case{"csa_dense_64K", std::vector<int64_t>(16, 4096), 6, 4, 0},
                      Case{"hca_64K", std::vector<int64_t>(16, 4096), 6, 128, 0},
                      Case{"csa_top128_64K", std::vector<int64_t>(16, 4096), 6, 4, 128}),
    [](const auto& param_info) { return param_info.param.name; });

}  // namespace
}  // namespace hadal::ops
