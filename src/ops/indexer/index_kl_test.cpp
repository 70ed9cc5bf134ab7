#include "ops/indexer/index_kl.h"

#include <cmath>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "ops/attention/sparse_attn.h"
#include "ops/indexer/index_scores.h"
#include "ops/indexer/index_topk.h"

namespace hadal::ops {
namespace {

/// One sequence whose attention really ran, so that lse is the joint one over window, blocks, sink.
struct Attended {
  Batch batch;
  at::Tensor q, rows, lse, scores;
  double scale;
  int64_t ratio;
  BlockView blocks() const { return BlockView::consecutive(rows, {0}); }
};

Attended attend(int64_t heads, const at::Tensor& sink, int64_t tokens = 22) {
  at::manual_seed(9);
  Attended a{.batch = Batch({tokens}, {0}, at::kCPU),
             .q = at::randn({tokens, heads, 6}, at::kDouble),
             .rows = at::randn({tokens / 4, 6}, at::kDouble),
             .lse = {},
             .scores = {},
             .scale = 0.5,
             .ratio = 4};
  const at::Tensor kv = at::randn({tokens, 6}, at::kDouble);
  a.lse = sparse_attn(a.q, kv, {}, a.blocks(), {}, sink, a.batch,
                      {.window = 5, .scale = a.scale, .ratio = a.ratio})
              .lse;
  a.scores =
      index_scores(at::randn({tokens, 2, 4}, at::kDouble), at::randn({tokens, 2}, at::kDouble),
                   BlockView::consecutive(at::randn({tokens / 4, 4}, at::kDouble), {0}), a.batch, 4,
                   Numerics::kIdeal);
  return a;
}

IndexKl kl_of(const Attended& a, const at::Tensor& scores, const at::Tensor& selection = {}) {
  return index_kl(scores, selection, a.q, a.blocks(), a.lse, a.batch, a.ratio, a.scale);
}

/// model.md 17.5 by loops: target over `allowed` blocks and KL of one query.
double expected_kl(const Attended& a, int64_t t, const std::vector<int64_t>& allowed) {
  std::vector<double> mass, logits;
  for (const int64_t s : allowed) {
    double sum = 0.0;
    for (int64_t h = 0; h < a.q.size(1); ++h) {
      sum += std::exp((a.q[t][h] * a.rows[s]).sum().item<double>() * a.scale -
                      a.lse[t][h].item<double>());
    }
    mass.push_back(sum);
    logits.push_back(a.scores[t][s].item<double>());
  }
  double total = 0.0, normaliser = 0.0, kl = 0.0;
  for (size_t i = 0; i < mass.size(); ++i) {
    total += mass[i];
    normaliser += std::exp(logits[i]);
  }
  for (size_t i = 0; i < mass.size(); ++i) {
    const double p = mass[i] / total, log_q = logits[i] - std::log(normaliser);
    kl += p * (std::log(p) - log_q);
  }
  return kl;
}

TEST(IndexKl, IsTheFormulaOverVisibleBlocks) {
  const Attended a = attend(3, at::randn({3}, at::kDouble));
  double expected = 0.0;
  for (int64_t t = 3; t < 22; ++t) {
    std::vector<int64_t> visible;
    for (int64_t s = 0; s < (t + 1) / 4; ++s) visible.push_back(s);
    expected += expected_kl(a, t, visible);
  }
  const IndexKl found = kl_of(a, a.scores);
  EXPECT_NEAR(found.sum.item<double>(), expected, 1e-10);
  EXPECT_EQ(found.num_queries, 19);  // queries 0, 1, 2 see no block
}

TEST(IndexKl, IsTheFormulaOverSelectedBlocks) {
  const Attended a = attend(3, at::randn({3}, at::kDouble));
  const at::Tensor selection = select_topk(a.scores, a.batch, 4, 2);
  double expected = 0.0;
  for (int64_t t = 3; t < 22; ++t) {
    std::vector<int64_t> chosen;
    for (int64_t i = 0; i < 2; ++i) {
      if (selection[t][i].item<int64_t>() >= 0) chosen.push_back(selection[t][i].item<int64_t>());
    }
    expected += expected_kl(a, t, chosen);
  }
  EXPECT_NEAR(kl_of(a, a.scores, selection).sum.item<double>(), expected, 1e-10);
}

TEST(IndexKl, SelectingEverythingIsTheDenseLoss) {
  const Attended a = attend(2, at::randn({2}, at::kDouble));
  const at::Tensor everything = select_topk(a.scores, a.batch, 4, 5);
  EXPECT_DOUBLE_EQ(kl_of(a, a.scores, everything).sum.item<double>(),
                   kl_of(a, a.scores).sum.item<double>());
}

// The optimum: scores equal to the log of the attention mass, up to a constant per query.
TEST(IndexKl, IsZeroWithoutGradientAtTheTarget) {
  const Attended a = attend(3, at::randn({3}, at::kDouble));
  const at::Tensor logits = at::einsum("thd,sd->ths", {a.q, a.rows}) * a.scale - a.lse.unsqueeze(2);
  at::Tensor scores = at::where(at::isfinite(a.scores), at::logsumexp(logits, {1}), a.scores) +
                      at::randn({22, 1}, at::kDouble);
  scores.requires_grad_(true);
  const IndexKl kl = kl_of(a, scores);
  EXPECT_NEAR(kl.sum.item<double>(), 0.0, 1e-12);
  EXPECT_LT(torch::autograd::grad({kl.sum}, {scores})[0].abs().max().item<double>(), 1e-12);
  EXPECT_GT(kl_of(a, a.scores).sum.item<double>(), 0.1);
}

// model.md 17.5: a sink takes mass of every block alike, so one head's target stays; with
// several heads it weighs them.
TEST(IndexKl, ASinkChangesTheTargetOnlyBetweenHeads) {
  const auto loss = [](int64_t heads, double sink) {
    at::Tensor sinks = at::zeros({heads}, at::kDouble);
    sinks[0] = sink;
    const Attended a = attend(heads, sinks);
    return kl_of(a, a.scores).sum.item<double>();
  };
  EXPECT_NEAR(loss(1, 0.0), loss(1, 6.0), 1e-10);
  EXPECT_GT(std::abs(loss(2, 0.0) - loss(2, 6.0)), 1e-3);
}

TEST(IndexKl, AHiddenBlockIsNoNan) {
  // Mass that underflows to nothing: the target is empty and the loss finite.
  Attended a = attend(2, at::zeros({2}, at::kDouble));
  a.lse = a.lse + 2000.0;
  EXPECT_TRUE(std::isfinite(kl_of(a, a.scores).sum.item<double>()));
}

TEST(SelectedMass, IsAShare) {
  const Attended a = attend(2, at::randn({2}, at::kDouble));
  const auto share = [&](int64_t k) {
    const KeptMass kept = selected_mass(select_topk(a.scores, a.batch, 4, k), a.q, a.blocks(),
                                        a.lse, a.batch, 4, a.scale);
    EXPECT_EQ(kept.num_queries, 19);
    EXPECT_LE(kept.sum.item<double>(), kept.best.item<double>() + 1e-9);
    return kept.sum.item<double>() / static_cast<double>(kept.num_queries);
  };
  EXPECT_NEAR(share(5), 1.0, 1e-12);
  EXPECT_LT(share(1), share(3));
  EXPECT_GT(share(1), 0.0);
}

}  // namespace
}  // namespace hadal::ops
