// Every op's gradient in float64 against central differences (testing/finite_differences.h).
#include <cmath>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "ops/attention/rope.h"
#include "ops/attention/sparse_attn.h"
#include "ops/compressor/compress.h"
#include "ops/gemm/linear.h"
#include "ops/indexer/hadamard.h"
#include "ops/indexer/index_kl.h"
#include "ops/indexer/index_scores.h"
#include "ops/indexer/index_topk.h"
#include "ops/loss/cross_entropy.h"
#include "ops/mhc/hyper_connection.h"
#include "ops/moe/gate.h"
#include "ops/moe/permute.h"
#include "ops/moe/swiglu.h"
#include "ops/norm/rms_norm.h"
#include "ops/quant/round_trip.h"
#include "ops/rows/embedding.h"
#include "ops/rows/gather.h"
#include "testing/finite_differences.h"

namespace hadal::ops {
namespace {

using testing::check_gradients;
using testing::DifferenceReport;
using testing::TensorList;

at::Tensor random(at::IntArrayRef shape, double size = 1.0) {
  return at::randn(shape, at::kDouble) * size;
}

class Gradient : public ::testing::Test {
 protected:
  void SetUp() override { at::manual_seed(11); }
};

TEST_F(Gradient, RmsNorm) {
  check_gradients("rms_norm",
                  [](const TensorList& in) { return TensorList{rms_norm(in[0], in[1], 1e-6)}; },
                  {random({4, 10}), random({10})});
  check_gradients(
      "head_norm",
      [](const TensorList& in) { return TensorList{head_norm(in[0], 1e-6, Numerics::kIdeal)}; },
      {random({3, 2, 8})});
}

TEST_F(Gradient, Rope) {
  const RopeTable table(6, 10000.0, nullptr);
  const at::Tensor cos_sin = table.cos_sin(at::tensor({0, 3, 1000}, at::kLong), 1000);
  for (const bool inverse : {false, true}) {
    check_gradients(inverse ? "rope inverse" : "rope",
                    [&](const TensorList& in) { return TensorList{rope(in[0], cos_sin, inverse)}; },
                    {random({3, 2, 10})});
  }
}

TEST_F(Gradient, Hadamard) {
  check_gradients("hadamard", [](const TensorList& in) { return TensorList{hadamard(in[0])}; },
                  {random({3, 16})});
}

TEST_F(Gradient, Compress) {
  // Two whole sequences, the second with a remainder; CSA (overlap) and HCA.
  for (const int64_t ratio : {4, 6}) {
    const Batch batch({13, 8}, {0, 0}, at::kCPU);
    const int64_t width = ratio == 4 ? 6 : 3;
    check_gradients(ratio == 4 ? "compress csa" : "compress hca",
                    [&](const TensorList& in) {
                      const Compressed r = compress(in[0], in[1], in[2], {}, {}, batch, ratio);
                      return TensorList{r.pooled, r.score};
                    },
                    {random({21, width}), random({21, width}), random({ratio, width})});
  }
}

TEST_F(Gradient, IndexScores) {
  const Batch batch({11, 6}, {0, 0}, at::kCPU);
  const auto view = [](const at::Tensor& rows) { return BlockView::consecutive(rows, {0, 2}); };
  check_gradients(
      "index_scores",
      [&](const TensorList& in) {
        return TensorList{index_scores(in[0], in[1], view(in[2]), batch, 4, Numerics::kIdeal)};
      },
      {random({17, 3, 4}), random({17, 3}), random({3, 4})}, {},
      [](const TensorList& in) {
        // A relu that switches on one side of an entry.
        return TensorList{at::matmul(in[0], in[2].t()) > 0};
      });
}

TEST_F(Gradient, IndexKl) {
  const Batch batch({19, 6}, {0, 0}, at::kCPU);
  const at::Tensor q = random({25, 2, 4}), rows = random({5, 4}), lse = random({25, 2}) + 3.0;
  const BlockView blocks = BlockView::consecutive(rows, {0, 4});
  const at::Tensor limit = (batch.pos() + 1).div(4, "floor").unsqueeze(1);
  const at::Tensor scores =
      random({25, 4}).masked_fill(at::arange(4, at::kLong).unsqueeze(0) >= limit, -INFINITY);
  for (const bool sparse : {false, true}) {
    const at::Tensor selection = sparse ? select_topk(scores, batch, 4, 2) : at::Tensor();
    check_gradients(
        sparse ? "index_kl selected" : "index_kl",
        [&](const TensorList& in) {
          // -inf entries cannot be moved: they are put in here.
          const at::Tensor visible = at::where(at::isfinite(scores), in[0], scores);
          return TensorList{index_kl(visible, selection, q, blocks, lse, batch, 4, 0.5).sum};
        },
        {at::where(at::isfinite(scores), scores, 0.0)});
  }
}

TEST_F(Gradient, IndexKlMovesScoresAlone) {
  const Batch batch({9}, {0}, at::kCPU);
  const at::Tensor q = random({9, 2, 4}).requires_grad_(true),
                   rows = random({2, 4}).requires_grad_(true),
                   lse = random({9, 2}).requires_grad_(true);
  const IndexKl kl = index_kl(random({9, 2}).requires_grad_(true), {}, q,
                              BlockView::consecutive(rows, {0}), lse, batch, 4, 0.5);
  for (const at::Tensor& grad : torch::autograd::grad({kl.sum}, {q, rows, lse}, {},
                                                      /*retain_graph=*/std::nullopt,
                                                      /*create_graph=*/false,
                                                      /*allow_unused=*/true)) {
    EXPECT_FALSE(grad.defined());
  }
}

struct AttentionCase {
  const char* name;
  int64_t ratio;
  int64_t topk;  // 0: every visible block
};

TEST_F(Gradient, SparseAttn) {
  // 70 tokens: the window crosses a chunk of 64 positions.
  const Batch batch({70, 9}, {0, 0}, at::kCPU);
  for (const AttentionCase& setup :
       {AttentionCase{"sparse_attn window", 0, 0}, AttentionCase{"sparse_attn dense blocks", 6, 0},
        AttentionCase{"sparse_attn selected blocks", 4, 3}}) {
    const AttentionParams params{.window = 12, .scale = 0.4, .ratio = setup.ratio};
    const int64_t first = setup.ratio > 0 ? 70 / setup.ratio : 0,
                  count = first + (setup.ratio > 0 ? 9 / setup.ratio : 0);
    at::Tensor selection;
    if (setup.topk > 0) {
      const BlockView keys = BlockView::consecutive(random({count, 4}), {0, first});
      selection = index_topk(random({79, 2, 4}), random({79, 2}), keys, batch, setup.ratio,
                             setup.topk, Numerics::kIdeal);
    }
    check_gradients(setup.name,
                    [&](const TensorList& in) {
                      const BlockView blocks =
                          in.size() > 3 ? BlockView::consecutive(in[3], {0, first}) : BlockView{};
                      const AttentionResult r =
                          sparse_attn(in[0], in[1], {}, blocks, selection, in[2], batch, params);
                      return TensorList{r.out, r.lse};
                    },
                    setup.ratio > 0 ? TensorList{random({79, 2, 6}), random({79, 6}), random({2}),
                                                 random({count, 6})}
                                    : TensorList{random({79, 2, 6}), random({79, 6}), random({2})},
                    {.samples = 60});
  }
}

TEST_F(Gradient, HyperConnections) {
  const TensorList inputs = {random({3, 4, 6}), random({24, 24}, 0.3), random({24}, 0.5),
                             random({3})};
  check_gradients("hc_pre, 20 Sinkhorn steps",
                  [](const TensorList& in) {
                    const HcPre r = hc_pre(in[0], in[1], in[2], in[3], {});
                    return TensorList{r.mixed, r.post, r.comb};
                  },
                  inputs, {.relative = 2e-6});
  check_gradients(
      "hc_post",
      [](const TensorList& in) { return TensorList{hc_post(in[0], in[1], in[2], in[3])}; },
      {random({3, 6}), random({3, 4, 6}), random({3, 4}), random({3, 4, 4})});
  check_gradients(
      "hc_head",
      [](const TensorList& in) { return TensorList{hc_head(in[0], in[1], in[2], in[3], {})}; },
      {random({3, 4, 6}), random({4, 24}, 0.3), random({4}, 0.5), random({1})});
}

TEST_F(Gradient, Gate) {
  // Token 0 has its second and third expert within the step of each other: moving either changes
  // the choice.
  at::Tensor logits = random({6, 8});
  logits[0].copy_(at::tensor({3.0, 2.0, 2.0 + 1e-7, 0.0, -1.0, -2.0, 0.5, 1.0}, at::kDouble));
  const at::Tensor bias = at::zeros({8}, at::kFloat);
  const DifferenceReport report = check_gradients(
      "gate",
      [&](const TensorList& in) {
        const Routing r = gate(in[0], bias, 2, 1.5);
        return TensorList{r.weights, r.affinity};
      },
      {logits}, {.max_skipped = 0.05},
      [&](const TensorList& in) { return TensorList{gate(in[0], bias, 2, 1.5).experts}; });
  EXPECT_EQ(report.skipped, 2);
  const at::Tensor experts = at::tensor({3, 1, 0, 7, 5, 2}, at::kLong).reshape({3, 2});
  check_gradients(
      "gate_fixed",
      [&](const TensorList& in) {
        const Routing r = gate_fixed(in[0], experts, 1.5);
        return TensorList{r.weights, r.affinity};
      },
      {random({3, 8}, 8.0)});  // softplus on both sides of its threshold of 20 now and then
}

TEST_F(Gradient, Permute) {
  const at::Tensor experts = at::tensor({0, 3, 1, 3, 0, 5, 3, 5}, at::kLong).reshape({4, 2});
  const Permutation order = permute_by_expert(experts, 6);
  check_gradients("permute_rows",
                  [&](const TensorList& in) { return TensorList{permute_rows(in[0], order)}; },
                  {random({4, 3})});
  check_gradients("combine",
                  [&](const TensorList& in) { return TensorList{combine(in[0], order, in[1])}; },
                  {random({8, 3}), random({4, 3})});
}

TEST_F(Gradient, Swiglu) {
  at::Tensor gate = random({6, 20}, 1.5), up = random({6, 20}, 1.5);
  gate[0][0] = 2.0 - 1e-7;  // these two cross the clamp within a step
  up[1][1] = -2.0 + 1e-7;
  for (const bool weighted : {false, true}) {
    const DifferenceReport report = check_gradients(
        weighted ? "swiglu weighted" : "swiglu",
        [&](const TensorList& in) {
          return TensorList{swiglu(in[0], in[1], weighted ? in[2] : at::Tensor(), 2.0)};
        },
        weighted ? TensorList{gate, up, random({6})} : TensorList{gate, up}, {},
        [](const TensorList& in) {
          return TensorList{in[0] > 2.0, in[1] > 2.0, in[1] < -2.0};
        });
    EXPECT_EQ(report.skipped, 2);
  }
}

TEST_F(Gradient, Linear) {
  for (const GemmRole role : {GemmRole::kFp32, GemmRole::kBf16, GemmRole::kFp8}) {
    check_gradients("linear",
                    [&](const TensorList& in) { return TensorList{linear(in[0], in[1], role)}; },
                    {random({3, 5}), random({4, 5})});
  }
  const at::Tensor offsets = at::tensor({0, 2, 2, 5}, at::kLong);  // the second expert has no row
  check_gradients("grouped_linear",
                  [&](const TensorList& in) {
                    return TensorList{grouped_linear(in[0], in[1], offsets, GemmRole::kFp4)};
                  },
                  {random({5, 4}), random({3, 2, 4})});
  check_gradients("group_linear",
                  [](const TensorList& in) { return TensorList{group_linear(in[0], in[1])}; },
                  {random({3, 2, 4}), random({2, 5, 4})});
}

TEST_F(Gradient, Embedding) {
  const at::Tensor ids = at::tensor({2, 0, 2, 5, 2}, at::kLong);
  check_gradients("embedding",
                  [&](const TensorList& in) { return TensorList{ops::embedding(ids, in[0])}; },
                  {random({7, 3})});
  const at::Tensor rows = at::tensor({4, 0, 6}, at::kLong);
  check_gradients(
      "gather_distinct_rows",
      [&](const TensorList& in) { return TensorList{gather_distinct_rows(in[0], rows)}; },
      {random({7, 3})});
}

TEST_F(Gradient, CrossEntropy) {
  const at::Tensor targets = at::tensor({1, -1, 4, 0, 8}, at::kLong);
  check_gradients("linear_cross_entropy",
                  [&](const TensorList& in) {
                    return TensorList{linear_cross_entropy(in[0], in[1], targets, /*chunk=*/2)};
                  },
                  {random({5, 4}), random({9, 4})});
}

// Round trips are steps: their gradient is the identity by definition, bit for bit.
TEST_F(Gradient, RoundTripsAreStraightThrough) {
  const std::vector<std::pair<const char*, std::function<at::Tensor(const at::Tensor&)>>> trips = {
      {"fp8_64", [](const at::Tensor& x) { return fp8_round_trip(x, 64); }},
      {"fp8_128", [](const at::Tensor& x) { return fp8_round_trip(x, 128); }},
      {"fp8_leading", [](const at::Tensor& x) { return fp8_round_trip_leading(x, 64, 64); }},
      {"fp4_32", [](const at::Tensor& x) { return fp4_round_trip(x, 32); }},
      {"lin8 input",
       [](const at::Tensor& x) { return quantise_input(x, GemmRole::kFp8, Numerics::kReleased); }},
      {"lin4 input",
       [](const at::Tensor& x) { return quantise_input(x, GemmRole::kFp4, Numerics::kReleased); }}};
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    for (const auto& [name, trip] : trips) {
      at::Tensor x = (at::randn({3, 128}) * 3.0).to(type).requires_grad_(true);
      const at::Tensor weight = at::randn({3, 128}).to(type);
      const at::Tensor y = trip(x);
      EXPECT_FALSE(at::equal(y.detach(), x.detach())) << name << " rounds nothing";
      const at::Tensor grad = torch::autograd::grad({y}, {x}, {weight})[0];
      EXPECT_TRUE(at::equal(grad, weight)) << name << " of " << type;
    }
  }
}

}  // namespace
}  // namespace hadal::ops
