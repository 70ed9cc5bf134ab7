#include "ops/mhc/hyper_connection.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "ops/mhc/hc_math.h"

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

INSTANTIATE_TEST_SUITE_P(Iterations, HcMath, ::testing::Values(1, 2, 20, hc::kMaxIters));

}  // namespace
}  // namespace hadal::ops
