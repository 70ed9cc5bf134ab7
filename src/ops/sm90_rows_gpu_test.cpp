// Ops that work row by row on BF16 tensors of a GPU: the bits of the CPU's kernels, for any number
// of rows.
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "ops/attention/rope.h"
#include "ops/indexer/hadamard.h"
#include "ops/mhc/hyper_connection.h"
#include "ops/moe/gate.h"
#include "ops/moe/gate_sm90.h"
#include "ops/moe/permute.h"
#include "ops/moe/swiglu.h"
#include "ops/norm/rms_norm.h"
#include "ops/quant/round_trip.h"
#include "testing/kernel_checks.h"

namespace hadal::ops {
namespace {

using testing::same_bits;

at::Tensor low(const at::Tensor& x) { return x.to(at::kBFloat16); }

class Sm90RowsGpu : public ::testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { at::manual_seed(7); }
  int64_t rows() const { return GetParam(); }
  static void expect_bits_of_the_cpu(const testing::KernelCall& call,
                                     const std::vector<at::Tensor>& inputs) {
    std::vector<at::Tensor> there;
    for (const at::Tensor& x : inputs) there.push_back(x.to(at::kCUDA));
    const std::vector<at::Tensor> wanted = call(inputs), found = call(there);
    ASSERT_EQ(found.size(), wanted.size());
    for (size_t i = 0; i < found.size(); ++i) {
      EXPECT_TRUE(found[i].is_cuda());
      EXPECT_TRUE(same_bits(found[i].cpu(), wanted[i])) << "output " << i;
    }
  }
};

TEST_P(Sm90RowsGpu, RmsNorm) {
  for (const int64_t dim : {128, 384, 4096}) {
    expect_bits_of_the_cpu([](const auto& in) { return std::vector{rms_norm(in[0], in[1], 1e-6)}; },
                           {low(at::randn({rows(), dim}) * 3), at::randn({dim})});
  }
}

TEST_P(Sm90RowsGpu, HeadNormAndRotation) {
  for (const Numerics numerics : {Numerics::kReleased, Numerics::kBf16}) {
    for (const bool inverse : {false, true}) {
      const at::Tensor angle = at::randn({rows(), 32});
      expect_bits_of_the_cpu(
          [&](const auto& in) {
            return std::vector{rope(head_norm(in[0], 1e-6, numerics), in[1], inverse)};
          },
          {low(at::randn({rows(), 6, 128}) * 2), at::stack({angle.cos(), angle.sin()}, -1)});
    }
  }
}

TEST_P(Sm90RowsGpu, HyperConnections) {
  const HcParams params{.sinkhorn_iters = 20, .norm_eps = 1e-6, .hc_eps = 1e-6};
  for (const int64_t dim : {256, 384, 1024}) {
    const at::Tensor streams = low(at::randn({rows(), 4, dim}));
    const at::Tensor fn = at::randn({24, 4 * dim}) * 0.03, base = at::randn({24}) * 0.5;
    expect_bits_of_the_cpu(
        [&](const auto& in) {
          const HcPre pre = hc_pre(in[0], in[1], in[2], in[3], params);
          return std::vector{pre.mixed, pre.post, pre.comb,
                             hc_post(in[4], in[0], pre.post, pre.comb)};
        },
        {streams, fn, base, at::randn({3}), low(at::randn({rows(), dim}))});
    expect_bits_of_the_cpu(
        [&](const auto& in) { return std::vector{hc_head(in[0], in[1], in[2], in[3], params)}; },
        {streams, fn.narrow(0, 0, 4), base.narrow(0, 0, 4), at::randn({1})});
  }
}

TEST_P(Sm90RowsGpu, Swiglu) {
  const auto call = [](const auto& in) {
    return std::vector{swiglu(in[0], in[1], in.size() > 2 ? in[2] : at::Tensor(), 2.0)};
  };
  const at::Tensor gate = low(at::randn({rows(), 384}) * 2), up = low(at::randn({rows(), 384}) * 2);
  expect_bits_of_the_cpu(call, {gate, up});
  expect_bits_of_the_cpu(call, {gate, up, at::rand({rows()})});
}

TEST_P(Sm90RowsGpu, RoundTrips) {
  expect_bits_of_the_cpu(
      [](const auto& in) {
        return std::vector{fp8_round_trip(in[0], 128), fp4_round_trip(in[0], 32),
                           fp8_round_trip_leading(in[0], 320, 64),
                           hadamard(in[0].narrow(1, 0, 128))};
      },
      {low(at::randn({rows(), 384}) * at::exp(at::randn({rows(), 384}) * 3))});
}

TEST_P(Sm90RowsGpu, GateIsTheTwins) {
  for (const bool fixed : {false, true}) {
    const int64_t experts = 12, topk = 3;
    const at::Tensor logits = at::randn({rows(), experts}) * 4, bias = at::randn({experts}) * 0.3;
    const at::Tensor table =
        std::get<1>(at::rand({rows(), experts}).sort(1)).narrow(1, 0, topk).contiguous();
    at::Tensor chosen = at::empty({rows(), topk}, at::kInt), weights = at::empty({rows(), topk}),
               affinity = at::empty_like(logits);
    gate_twin({.logits = logits.const_data_ptr<float>(),
               .bias = fixed ? nullptr : bias.const_data_ptr<float>(),
               .table = table.const_data_ptr<int64_t>(),
               .ids = nullptr,
               .experts = chosen.mutable_data_ptr<int32_t>(),
               .weights = weights.mutable_data_ptr<float>(),
               .tokens = rows(),
               .num_experts = experts,
               .topk = topk,
               .scale = 1.5f,
               .affinity = affinity.mutable_data_ptr<float>()});
    const at::Tensor there = logits.to(at::kCUDA);
    const Routing found = fixed ? gate_fixed(there, table.to(at::kCUDA), 1.5)
                                : gate(there, bias.to(at::kCUDA), topk, 1.5);
    EXPECT_TRUE(at::equal(found.experts.cpu().to(at::kInt), chosen)) << fixed;
    EXPECT_TRUE(same_bits(found.weights.cpu(), weights)) << fixed;
    EXPECT_TRUE(same_bits(found.affinity.cpu(), affinity)) << fixed;
  }
}

TEST_P(Sm90RowsGpu, PermuteAndCombine) {
  const int64_t experts = 9, topk = 3, dim = 256;
  const at::Tensor chosen =
      std::get<0>(std::get<1>(at::rand({rows(), experts}).sort(1)).narrow(1, 0, topk).sort(1));
  expect_bits_of_the_cpu(
      [&](const auto& in) {
        const Permutation order = permute_by_expert(in[2], experts);
        const at::Tensor sorted = permute_rows(in[0], order);
        return std::vector{order.token,   order.slot, order.place,
                           order.offsets, sorted,     combine(sorted, order, in[1])};
      },
      {low(at::randn({rows(), dim})), low(at::randn({rows(), dim})), chosen});
}

INSTANTIATE_TEST_SUITE_P(Rows, Sm90RowsGpu, ::testing::Values(1, 3, 65, 300));

}  // namespace
}  // namespace hadal::ops
