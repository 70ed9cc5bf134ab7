// Blocks computed again by the backward pass: the same measures and gradients, bit for bit, every
// auxiliary term once, and nothing kept but what stands before a block.
#include <functional>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/function.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/contiguous_kv.h"
#include "model/init.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"
#include "train/objective.h"
#include "train/schedule.h"

namespace hadal::train {
namespace {

using model::AttentionMode;
using ops::Numerics;

PackedRows rows(uint64_t seed) {
  PackedRows packed{
      .rows = 2, .row_length = 24, .tokens = {}, .scored = {}, .sample_lengths = {17, 7, 24}};
  at::manual_seed(seed);
  const at::Tensor ids = at::randint(128, {48}, at::kInt);
  packed.tokens.assign(ids.data_ptr<int32_t>(), ids.data_ptr<int32_t>() + ids.numel());
  packed.scored.assign(packed.tokens.size(), 1);
  return packed;
}

/// Gradients of two micro-batches, and what was measured on the way.
struct Gradients {
  StepMeasures measures;
  std::vector<std::pair<std::string, at::Tensor>> of;
};

Gradients gradients(const model::ModelConfig& config,
                    at::ScalarType type,
                    ObjectiveParams params,
                    bool recompute) {
  const testing::OneAtenThread one_thread;
  model::Transformer model = testing::random_model(config, 4, type);
  model::require_gradients(model);
  const MicroBatch first(rows(5), at::Device(at::kCPU)), second(rows(6), at::Device(at::kCPU));
  StepCounts counts;
  counts.add(first, config);
  counts.add(second, config);
  params.recompute = recompute;
  Gradients result;
  StepSums sums(model);
  accumulate(model, first, counts, params, sums);
  accumulate(model, second, counts, params, sums);
  result.measures = sums.finish();
  model.visit([&](model::Parameter& parameter) {
    result.of.emplace_back(parameter.name, parameter.value.grad());
  });
  return result;
}

void expect_same(const at::Tensor& a, const at::Tensor& b, const std::string& what) {
  ASSERT_EQ(a.defined(), b.defined()) << what;
  if (a.defined()) {
    EXPECT_TRUE(at::equal(a, b)) << what;
  }
}

class Recompute : public ::testing::TestWithParam<std::tuple<AttentionMode, Numerics>> {};

TEST_P(Recompute, MeasuresAndGradientsAreThoseOfThePlainPass) {
  const auto [mode, numerics] = GetParam();
  ObjectiveParams params{.mtp_weight = 0.3,
                         .balance_weight = 0.2,
                         .index_weight = 0.7,
                         .mode = mode,
                         .numerics = numerics,
                         .count_clamps = true};
  const Gradients plain = gradients(testing::mini_config(), at::kFloat, params, false);
  const Gradients again = gradients(testing::mini_config(), at::kFloat, params, true);
  expect_same(again.measures.main_loss, plain.measures.main_loss, "main");
  expect_same(again.measures.mtp_loss, plain.measures.mtp_loss, "mtp");
  expect_same(again.measures.balance_loss, plain.measures.balance_loss, "balance");
  expect_same(again.measures.index_loss, plain.measures.index_loss, "index");
  expect_same(again.measures.clamped, plain.measures.clamped, "clamped");
  for (size_t block = 0; block < plain.measures.expert_load.size(); ++block)
    expect_same(again.measures.expert_load[block], plain.measures.expert_load[block], "load");
  int64_t with_gradient = 0;
  for (size_t i = 0; i < plain.of.size(); ++i) {
    expect_same(again.of[i].second, plain.of[i].second, plain.of[i].first);
    with_gradient += plain.of[i].second.defined() ? 1 : 0;
  }
  // In warm-up the indexers alone learn, and no gradient is none, not zero.
  if (mode == AttentionMode::kIndexerWarmup) {
    EXPECT_EQ(with_gradient, 12);
  } else {
    EXPECT_GT(with_gradient, 50);
  }
  if (mode != AttentionMode::kSparse || numerics != Numerics::kIdeal) return;
  // The terms' gradients are among them: without a term they are others.
  params.balance_weight = 0.0;
  const Gradients unbalanced = gradients(testing::mini_config(), at::kFloat, params, true);
  for (size_t i = 0; i < plain.of.size(); ++i) {
    if (plain.of[i].first == "layers.2.ffn.gate.weight") {
      EXPECT_FALSE(at::equal(unbalanced.of[i].second, plain.of[i].second));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Passes,
                         Recompute,
                         ::testing::Values(std::tuple(AttentionMode::kDense, Numerics::kBf16),
                                           std::tuple(AttentionMode::kIndexerWarmup,
                                                      Numerics::kReleased),
                                           std::tuple(AttentionMode::kSparse, Numerics::kIdeal),
                                           std::tuple(AttentionMode::kSparse, Numerics::kBf16),
                                           std::tuple(AttentionMode::kSparse, Numerics::kReleased),
                                           std::tuple(AttentionMode::kSparse, Numerics::kFp8)),
                         [](const auto& pass) {
                           return concat(attention_mode_name(std::get<0>(pass.param)), '_',
                                         ops::numerics_name(std::get<1>(pass.param)));
                         });

// In float64 every op runs its reference, whose library products may be other ones where nothing
// asks for gradients: the same but for rounding.
TEST(RecomputeReference, GradientsAreThoseOfThePlainPassButForRounding) {
  const ObjectiveParams params{.mtp_weight = 0.3,
                               .balance_weight = 0.2,
                               .index_weight = 0.7,
                               .mode = AttentionMode::kSparse,
                               .numerics = Numerics::kIdeal};
  const Gradients plain = gradients(testing::mini_config(), at::kDouble, params, false);
  const Gradients again = gradients(testing::mini_config(), at::kDouble, params, true);
  for (size_t i = 0; i < plain.of.size(); ++i) {
    const at::Tensor &a = again.of[i].second, &b = plain.of[i].second;
    ASSERT_EQ(a.defined(), b.defined()) << plain.of[i].first;
    if (!a.defined()) continue;
    EXPECT_LE((a - b).norm().item<double>(), 1e-13 * b.norm().item<double>()) << plain.of[i].first;
  }
}

/// Nodes of the graph behind a tensor.
size_t graph_nodes(const at::Tensor& x) {
  std::set<torch::autograd::Node*> seen;
  const std::function<void(torch::autograd::Node*)> visit = [&](torch::autograd::Node* node) {
    if (node == nullptr || !seen.insert(node).second) return;
    for (const torch::autograd::Edge& edge : node->next_edges()) visit(edge.function.get());
  };
  visit(x.grad_fn().get());
  return seen.size();
}

TEST(RecomputeGraph, ABlockIsOneNodeAndItsParameters) {
  const model::ModelConfig small = testing::tiny_config();
  model::Transformer model = testing::random_model(small, 4, at::kFloat);
  model::require_gradients(model);
  size_t parameters = 0;
  model.visit([&](const model::Parameter& parameter) { parameters += parameter.trainable(); });
  const ops::Batch batch({40}, {0}, at::kCPU);
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = Numerics::kIdeal;
  const size_t plain = graph_nodes(model.forward(at::arange(40), context).streams);
  context.recompute = true;
  const model::ForwardOutput output = model.forward(at::arange(40), context);
  const size_t embedding = graph_nodes(model.embed(at::arange(40), context.numerics));
  EXPECT_LE(graph_nodes(output.streams),
            parameters + embedding + static_cast<size_t>(small.n_layers));
  EXPECT_GT(plain, 2 * graph_nodes(output.streams));
  // What the second run needs is not handed out.
  EXPECT_FALSE(output.aux[1].moe.routing.experts.defined());
  EXPECT_FALSE(output.aux[1].attn.selection.defined());
}

TEST(RecomputeGraph, TheBatchNeedNotOutliveTheForwardPass) {
  const testing::OneAtenThread one_thread;
  model::Transformer model = testing::random_model(testing::mini_config(), 4, at::kFloat);
  model::require_gradients(model);
  const auto gradient = [&](bool recompute) {
    at::Tensor streams;
    {
      const ops::Batch batch({24, 7}, {0, 0}, at::kCPU);
      model::ForwardContext context;
      context.batch = &batch;
      context.numerics = Numerics::kIdeal;
      context.recompute = recompute;
      streams = model.forward(at::arange(31), context).streams;
    }
    streams.square().mean().backward();
    at::Tensor grad;
    model.visit([&](model::Parameter& parameter) {
      if (parameter.name == "embed.weight") grad = parameter.value.grad().clone();
      parameter.value.mutable_grad() = at::Tensor();
    });
    return grad;
  };
  EXPECT_TRUE(at::equal(gradient(true), gradient(false)));
}

TEST(RecomputeGraph, APassOverACacheCannotBeRepeated) {
  const model::ModelConfig small = testing::tiny_config();
  model::Transformer model = testing::random_model(small, 4, at::kFloat);
  model::require_gradients(model);
  model::ContiguousKv kv(small, 1, 64, at::kFloat, at::kCPU);
  const ops::Batch batch = kv.begin({0}, {8});
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = Numerics::kIdeal;
  context.kv = &kv;
  context.recompute = true;
  EXPECT_THROW(model.forward(at::arange(8), context), Error);
}

}  // namespace
}  // namespace hadal::train
