#include "ops/mhc/hyper_connection.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "ops/mhc/hc_math.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

constexpr int64_t kTokens = 5, kDim = 8;

struct Inputs {
  at::Tensor streams, fn, base, scale;
};

/// FP64 leaves; the logits reach far enough for a combination that is not close to uniform.
Inputs make_inputs() {
  at::manual_seed(3);
  const auto random = [](at::IntArrayRef shape, double size) {
    return (at::randn(shape, at::dtype(at::kDouble)) * size).requires_grad_(true);
  };
  return {.streams = random({kTokens, hc::kStreams, kDim}, 1.0),
          .fn = random({hc::kRows, hc::kStreams * kDim}, 0.3),
          .base = random({hc::kRows}, 0.5),
          .scale = random({3}, 1.0)};
}

template <size_t N>
void load(double (&out)[N], const at::Tensor& x) {
  const at::Tensor dense = x.detach().contiguous();
  ASSERT_EQ(dense.numel(), static_cast<int64_t>(N));
  for (size_t i = 0; i < N; ++i) out[i] = dense.const_data_ptr<double>()[i];
}

template <size_t N>
at::Tensor store(const double (&x)[N]) {
  return at::tensor(at::ArrayRef<double>(x, N), at::dtype(at::kDouble));
}

hc::GateInput<double> gate_input(const Inputs& in,
                                 const at::Tensor& z,
                                 int64_t token,
                                 const HcParams& params) {
  hc::GateInput<double> gates{};
  load(gates.z, z[token]);
  load(gates.scale, in.scale);
  load(gates.base, in.base);
  gates.eps = params.hc_eps;
  gates.iters = static_cast<int>(params.sinkhorn_iters);
  return gates;
}

struct HcMath : ::testing::TestWithParam<int64_t> {};

TEST_P(HcMath, TokenGatesMatchReference) {
  const Inputs in = make_inputs();
  const HcParams params{.sinkhorn_iters = GetParam()};
  const HcPre expected = reference::hc_pre(in.streams, in.fn, in.base, in.scale, params);
  const at::Tensor flat = in.streams.detach().flatten(1);
  const at::Tensor rho = at::rsqrt(flat.square().mean(1) + params.norm_eps);
  const at::Tensor z = at::mm(flat, in.fn.detach().t()) * rho.unsqueeze(1);
  for (int64_t t = 0; t < kTokens; ++t) {
    double post[hc::kStreams], comb[hc::kCells];
    hc::post_and_comb(gate_input(in, z, t, params), post, comb);
    EXPECT_TRUE(at::allclose(store(post), expected.post[t], 1e-12, 1e-12));
    EXPECT_TRUE(at::allclose(store(comb), expected.comb[t].flatten(), 1e-12, 1e-12));
  }
}

TEST_P(HcMath, TokenGradientsMatchAutograd) {
  const Inputs in = make_inputs();
  const HcParams params{.sinkhorn_iters = GetParam()};
  const HcPre out = reference::hc_pre(in.streams, in.fn, in.base, in.scale, params);
  const at::Tensor d_mixed = at::randn_like(out.mixed), d_post = at::randn_like(out.post),
                   d_comb = at::randn_like(out.comb);
  const auto expected =
      torch::autograd::grad({out.mixed, out.post, out.comb}, {in.streams, in.fn, in.base, in.scale},
                            {d_mixed, d_post, d_comb});
  const at::Tensor streams = in.streams.detach(), flat = streams.flatten(1), fn = in.fn.detach();
  const at::Tensor rho = at::rsqrt(flat.square().mean(1) + params.norm_eps);
  const at::Tensor z = at::mm(flat, fn.t()) * rho.unsqueeze(1);
  at::Tensor grad_flat = at::zeros_like(flat), grad_fn = at::zeros_like(fn),
             grad_base = at::zeros_like(in.base), grad_scale = at::zeros_like(in.scale);
  for (int64_t t = 0; t < kTokens; ++t) {
    const hc::GateInput<double> gates = gate_input(in, z, t, params);
    double pre[hc::kStreams], post[hc::kStreams], comb[hc::kCells];
    load(pre, at::mv(streams[t], d_mixed[t]));
    load(post, d_post[t]);
    load(comb, d_comb[t]);
    double d_logit[hc::kRows], dz_rho[hc::kRows], v_factor;
    hc::gates_backward(gates, pre, post, comb, d_logit);
    hc::logits_backward(gates, rho[t].item<double>(), static_cast<double>(flat.size(1)), d_logit,
                        dz_rho, v_factor);
    grad_base += store(d_logit);
    for (int o = 0; o < hc::kRows; ++o) {
      grad_scale[hc::scale_index(o)] += d_logit[o] * gates.z[o];
    }
    for (int j = 0; j < hc::kStreams; ++j) {
      const double weight = hc::logistic(hc::logit(gates, j)) + params.hc_eps;
      grad_flat[t].narrow(0, j * kDim, kDim) += weight * d_mixed[t];
    }
    grad_flat[t] += at::mv(fn.t(), store(dz_rho)) - v_factor * flat[t];
    grad_fn += at::outer(store(dz_rho), flat[t]);
  }
  EXPECT_TRUE(at::allclose(grad_flat.view_as(streams), expected[0], 1e-9, 1e-11));
  EXPECT_TRUE(at::allclose(grad_fn, expected[1], 1e-9, 1e-11));
  EXPECT_TRUE(at::allclose(grad_base, expected[2], 1e-9, 1e-11));
  EXPECT_TRUE(at::allclose(grad_scale, expected[3], 1e-9, 1e-11));
}

using Tensors = std::vector<at::Tensor>;

// 4 streams are the model's; the kernels take any number.
class HcKernel : public ::testing::TestWithParam<int64_t> {};

TEST_P(HcKernel, KeepsTheContract) {
  at::manual_seed(4);
  const int64_t n = GetParam();
  for (const int64_t dim : {16, 37, 128}) {
    const at::Tensor streams = at::randn({6, n, dim}), fn = at::randn({(2 + n) * n, n * dim}) * 0.2,
                     base = at::randn({(2 + n) * n}) * 0.5, scale = at::randn({3});
    const auto pre = [](const Tensors& in) {
      const HcPre r = hc_pre(in[0], in[1], in[2], in[3], {});
      return Tensors{r.mixed, r.post, r.comb};
    };
    testing::check_kernel("hc_pre fp32", pre, {streams, fn, base, scale}, 1, 5e-6);
    testing::check_kernel("hc_pre bf16", pre, {streams.to(at::kBFloat16), fn, base, scale}, 1,
                          4e-3);
    const at::Tensor out = at::randn({6, dim}), weights = at::rand({6, n}) * 2.0,
                     comb = at::softmax(at::randn({6, n, n}), 1);
    const auto post = [](const Tensors& in) {
      return Tensors{hc_post(in[0], in[1], in[2], in[3])};
    };
    testing::check_kernel("hc_post fp32", post, {out, streams, weights, comb}, 4, 1e-6);
    testing::check_kernel("hc_post bf16", post,
                          {out.to(at::kBFloat16), streams.to(at::kBFloat16), weights, comb}, 4,
                          4e-3);
    const auto head = [](const Tensors& in) {
      return Tensors{hc_head(in[0], in[1], in[2], in[3], {})};
    };
    testing::check_kernel("hc_head fp32", head,
                          {streams, fn.narrow(0, 0, n).contiguous(),
                           base.narrow(0, 0, n).contiguous(), scale.narrow(0, 0, 1).contiguous()},
                          1, 5e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Streams, HcKernel, ::testing::Values(1, 2, 4, 5));

HcPre random_mix(int64_t n, double size, int64_t iters = 20) {
  at::manual_seed(5);
  return hc_pre(at::randn({9, n, 8}, at::kDouble), at::randn({(2 + n) * n, n * 8}, at::kDouble),
                at::randn({(2 + n) * n}, at::kDouble) * size, at::full({3}, size, at::kDouble),
                {.sinkhorn_iters = iters});
}

// model.md 3.2: it ends on columns, so they sum to 1 within eps; rows come close.
TEST(HyperConnection, CombinationIsDoublyStochastic) {
  const HcPre r = random_mix(4, 0.5);
  EXPECT_GT(r.comb.min().item<double>(), 0.0);
  EXPECT_LT((r.comb.sum(1) - 1.0).abs().max().item<double>(), 3e-6);
  // Twenty steps leave rows of random matrices a few percent off, five hundred do not.
  EXPECT_LT((r.comb.sum(2) - 1.0).abs().max().item<double>(), 5e-2);
  const at::Tensor longer = random_mix(4, 0.5, 500).comb;
  EXPECT_LT((longer.sum(2) - 1.0).abs().max().item<double>(), 1e-5);
}

TEST(HyperConnection, MixOutSendsRowsToColumns) {
  // All of stream 0 to stream 2: P[0, 2] = 1. With the transposed matrix it would stay behind.
  at::Tensor comb = at::zeros({1, 4, 4});
  comb[0][0][2] = 1.0;
  const at::Tensor streams = at::arange(1, 5).to(at::kFloat).reshape({1, 4, 1});
  const at::Tensor out = hc_post(at::full({1, 1}, 10.0), streams,
                                 at::tensor({0.0f, 1.0f, 2.0f, 0.5f}).reshape({1, 4}), comb);
  EXPECT_TRUE(at::equal(out.flatten(), at::tensor({0.0f, 10.0f, 21.0f, 5.0f})));
}

TEST(HyperConnection, EqualStreamsStayEqualUpToTheOutput) {
  // Columns of P sum to 1: a common stream is carried over unchanged, the output is added c-fold.
  const HcPre r = random_mix(4, 0.7);
  const at::Tensor x = at::randn({9, 1, 8}, at::kDouble).expand({9, 4, 8});
  const at::Tensor carried =
      hc_post(at::zeros({9, 8}, at::kDouble), x.contiguous(), r.post, r.comb);
  EXPECT_LT((carried - x).abs().max().item<double>(), 1e-5);
}

INSTANTIATE_TEST_SUITE_P(Iterations, HcMath, ::testing::Values(1, 2, 20, hc::kMaxIters));

}  // namespace
}  // namespace hadal::ops
