// Replay: a pass that is forced to its own choices is the free pass, bit for bit; others' are
// obeyed; what cannot be forced is an error.
#include "model/choices.h"

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/contiguous_kv.h"
#include "model/init.h"
#include "model/transformer.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"

namespace hadal::model {
namespace {

using ops::Numerics;

/// What a pass computes and chose, block by block; the MTP block is the last.
struct Outcome {
  at::Tensor streams, head_input;
  std::vector<BlockAux> aux;
  std::vector<BlockChoices> choices;
};

class Replay : public ::testing::TestWithParam<Numerics> {
 protected:
  ForwardContext context(const ops::Batch& batch) const {
    ForwardContext context;
    context.batch = &batch;
    context.numerics = GetParam();
    context.request = {.experts = true, .routing = true, .selection = true};
    return context;
  }

  Outcome run(const at::Tensor& ids, ForwardContext context) const {
    ForwardOutput main = model_.forward(ids, context);
    MtpOutput mtp = model_.mtp(main.streams, ids, context);
    Outcome outcome{.streams = main.streams,
                    .head_input = mtp.head_input,
                    .aux = std::move(main.aux),
                    .choices = {}};
    outcome.aux.push_back(std::move(mtp.aux));
    for (int64_t block = 0; block < config_.n_blocks(); ++block)
      outcome.choices.push_back(
          choices_of(outcome.aux[static_cast<size_t>(block)], config_, block, *context.batch));
    return outcome;
  }

  /// Training's way: whole sequences, no cache.
  Outcome packed(std::vector<BlockChoices> forced = {}) const {
    ForwardContext context = this->context(batch_);
    context.forced = std::move(forced);
    return run(ids_, std::move(context));
  }

  /// A service's way: two sequences through a cache, by steps of the given lengths, forced to the
  /// rows of `all` where it is given. Rows come back in packed order.
  Outcome stepwise(const std::vector<std::vector<int64_t>>& steps,
                   const std::vector<BlockChoices>& all) const {
    const at::NoGradGuard no_grad;
    ContiguousKv kv(config_, 2, 256, GetParam() == Numerics::kIdeal ? at::kFloat : at::kBFloat16,
                    at::kCPU);
    std::vector<at::Tensor> streams, heads, order;
    std::vector<std::vector<at::Tensor>> experts(static_cast<size_t>(config_.n_blocks())),
        selections = experts;
    for (const std::vector<int64_t>& lengths : steps) {
      std::vector<at::Tensor> rows;
      for (int64_t slot = 0; slot < 2; ++slot) {
        const int64_t first = batch_.begin(slot) + kv.length(slot);
        rows.push_back(at::arange(first, first + lengths[static_cast<size_t>(slot)], at::kLong));
      }
      order.push_back(at::cat(rows));
      const ops::Batch batch = kv.begin({0, 1}, lengths);
      ForwardContext context = this->context(batch);
      context.kv = &kv;
      for (const BlockChoices& choices : all) {
        context.forced.push_back(
            {.experts = choices.experts.index_select(0, order.back()), .selection = {}});
        if (choices.selection.defined())
          context.forced.back().selection = choices.selection.index_select(0, order.back());
      }
      const Outcome step = run(ids_.index_select(0, order.back()), std::move(context));
      kv.advance();
      streams.push_back(step.streams);
      heads.push_back(step.head_input);
      for (size_t block = 0; block < step.choices.size(); ++block) {
        experts[block].push_back(step.choices[block].experts);
        selections[block].push_back(step.choices[block].selection);
      }
    }
    const at::Tensor back = at::cat(order).argsort();
    const auto packed_rows = [&](const std::vector<at::Tensor>& parts) {
      return parts[0].defined() ? at::cat(parts).index_select(0, back) : at::Tensor();
    };
    Outcome outcome{.streams = packed_rows(streams),
                    .head_input = packed_rows(heads),
                    .aux = {},
                    .choices = {}};
    for (size_t block = 0; block < experts.size(); ++block)
      outcome.choices.push_back(
          {.experts = packed_rows(experts[block]), .selection = packed_rows(selections[block])});
    return outcome;
  }

  static void expect_equal(const Outcome& a, const Outcome& b) {
    EXPECT_TRUE(at::equal(a.streams, b.streams));
    EXPECT_TRUE(at::equal(a.head_input, b.head_input));
    for (size_t block = 0; block < a.choices.size(); ++block) {
      EXPECT_TRUE(at::equal(a.choices[block].experts, b.choices[block].experts)) << block;
      ASSERT_EQ(a.choices[block].selection.defined(), b.choices[block].selection.defined());
      if (a.choices[block].selection.defined()) {
        EXPECT_TRUE(at::equal(a.choices[block].selection, b.choices[block].selection)) << block;
      }
    }
  }

  testing::OneAtenThread one_thread_;
  ModelConfig config_ = testing::mini_config();
  Transformer model_ = testing::random_model(config_, 11, at::kFloat);
  ops::Batch batch_{{45, 30}, {0, 0}, at::kCPU};
  at::Tensor ids_ = at::randint(config_.vocab_size, {75}, at::kLong);
  const std::vector<std::vector<int64_t>> steps_ = {{17, 5}, {1, 1}, {25, 22}, {1, 1}, {1, 1}};
};

TEST_P(Replay, APassForcedToItsOwnChoicesIsTheFreePass) {
  const at::NoGradGuard no_grad;
  const Outcome free = packed();
  expect_equal(packed(free.choices), free);
}

TEST_P(Replay, StepsOverACacheAndTrainingForceEachOther) {
  const Outcome free = packed();
  const Outcome steps = stepwise(steps_, {});
  expect_equal(steps, free);
  expect_equal(stepwise(steps_, free.choices), free);
  expect_equal(packed(steps.choices), free);
}

TEST_P(Replay, ATrainingForwardHasTheFreeTermsAndGradients) {
  require_gradients(model_);
  const auto differentiate = [&](std::vector<BlockChoices> forced) {
    ForwardContext context = this->context(batch_);
    context.request.index_loss = true;
    context.forced = std::move(forced);
    const Outcome outcome = run(ids_, std::move(context));
    at::Tensor total = outcome.streams.to(at::kFloat).square().mean() +
                       outcome.head_input.to(at::kFloat).square().mean();
    for (const BlockAux& aux : outcome.aux) {
      total = total + aux.moe.routing.affinity.square().sum();
      if (aux.attn.index_loss.sum.defined()) total = total + aux.attn.index_loss.sum;
    }
    total.backward();
    std::vector<at::Tensor> results{total.detach()};
    model_.visit([&](Parameter& parameter) {
      if (!parameter.value.grad().defined()) return;
      results.push_back(parameter.value.grad().clone());
      parameter.value.mutable_grad() = at::Tensor();
    });
    return std::pair(outcome.choices, results);
  };
  const auto [choices, free] = differentiate({});
  const auto [again, forced] = differentiate(choices);
  ASSERT_EQ(free.size(), forced.size());
  for (size_t i = 0; i < free.size(); ++i) EXPECT_TRUE(at::equal(free[i], forced[i])) << i;
}

TEST_P(Replay, OtherExpertsAreObeyedInEveryLayer) {
  const at::NoGradGuard no_grad;
  const Outcome free = packed();
  std::vector<BlockChoices> others = free.choices;
  for (BlockChoices& choices : others) {
    choices.experts = (choices.experts + 1).remainder(config_.n_routed_experts);
  }
  const Outcome forced = packed(others);
  EXPECT_FALSE(at::equal(forced.streams, free.streams));
  for (size_t block = 0; block < others.size(); ++block) {
    const ops::Routing& routing = forced.aux[block].moe.routing;
    EXPECT_TRUE(at::equal(routing.experts, std::get<0>(others[block].experts.sort(1)))) << block;
    const at::Tensor affinity = routing.affinity.gather(1, routing.experts);
    EXPECT_TRUE(at::allclose(routing.weights,
                             affinity / affinity.sum(1, true) * config_.route_scale, 1e-5, 0.0))
        << block;
  }
}

TEST_P(Replay, AnotherSelectionIsObeyedWhereItIsAnother) {
  const at::NoGradGuard no_grad;
  const Outcome free = packed();
  constexpr int64_t kBlock = 3, kToken = 40;  // the last CSA layer; 10 visible blocks
  std::vector<BlockChoices> others(static_cast<size_t>(kBlock) + 1);
  others[kBlock].selection = free.choices[kBlock].selection.clone();
  const at::Tensor row = others[kBlock].selection[kToken];
  // Four of the six that the free pass did not choose.
  const at::Tensor chosen = row.clone().to(at::kLong);
  at::Tensor mask = at::ones({10}, at::kBool);
  mask.index_fill_(0, chosen, 0);
  row.copy_(mask.nonzero().flatten().narrow(0, 0, 4).to(at::kInt));
  const Outcome forced = packed(others);
  EXPECT_TRUE(at::equal(forced.choices[kBlock].selection, others[kBlock].selection));
  EXPECT_TRUE(at::equal(forced.streams.narrow(0, 0, kToken), free.streams.narrow(0, 0, kToken)));
  EXPECT_FALSE(at::equal(forced.streams[kToken], free.streams[kToken]));
  // The other sequence is behind that token and sees nothing of it.
  EXPECT_TRUE(at::equal(forced.streams.narrow(0, 45, 30), free.streams.narrow(0, 45, 30)));
}

TEST_P(Replay, WhereFewBlocksAreVisibleAllAreChosen) {
  const at::NoGradGuard no_grad;
  const ops::Batch batch({19, 9}, {0, 0}, at::kCPU);  // at most 4 blocks
  ForwardContext context = this->context(batch);
  const at::Tensor ids = ids_.narrow(0, 0, 28);
  const Outcome free = run(ids, context);
  EXPECT_FALSE(free.aux[1].attn.selection.defined());
  ASSERT_TRUE(free.choices[1].selection.defined());
  EXPECT_EQ((free.choices[1].selection[18] >= 0).sum().item<int64_t>(), 4);
  context.forced = free.choices;
  expect_equal(run(ids, context), free);
}

INSTANTIATE_TEST_SUITE_P(Numerics,
                         Replay,
                         ::testing::Values(Numerics::kIdeal, Numerics::kBf16, Numerics::kReleased),
                         [](const ::testing::TestParamInfo<Numerics>& numerics) {
                           return std::string(ops::numerics_name(numerics.param));
                         });

TEST(ForcedChoices, WhatCannotBeForcedIsAnErrorThatSaysWhy) {
  const ModelConfig config = testing::mini_config();
  const Transformer model = testing::random_model(config, 11, at::kFloat);
  const ops::Batch batch({40}, {0}, at::kCPU);
  const at::Tensor ids = at::arange(40);
  const at::Tensor experts = at::tensor({1, 3}, at::kLong).expand({40, 2}).contiguous();
  at::Tensor selection = at::full({40, 4}, -1, at::kInt);
  selection.select(1, 0).narrow(0, 3, 37).fill_(0);
  const auto message = [&](int64_t block, const BlockChoices& choices,
                           AttentionMode mode = AttentionMode::kSparse) -> std::string {
    const at::NoGradGuard no_grad;
    ForwardContext context;
    context.batch = &batch;
    context.numerics = Numerics::kIdeal;
    context.mode = mode;
    context.forced.resize(static_cast<size_t>(block) + 1);
    context.forced.back() = choices;
    try {
      const at::Tensor streams = model.forward(ids, context).streams;
      if (block == config.n_layers) model.mtp(streams, ids, context);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  };
  const auto expect = [&](int64_t block, const BlockChoices& choices, const std::string& part) {
    const std::string found = message(block, choices);
    EXPECT_NE(found.find(part), std::string::npos) << part << "; found: " << found;
  };
  const auto with = [](const at::Tensor& x, int64_t token, int64_t column, int64_t value) {
    at::Tensor changed = x.clone();
    changed[token][column] = value;
    return changed;
  };
  EXPECT_EQ(message(1, {.experts = experts, .selection = selection}), "");
  // Hashed layers and the MTP block, too.
  for (const int64_t block : {int64_t{0}, int64_t{2}, config.n_layers}) {
    EXPECT_EQ(message(block, {.experts = experts, .selection = {}}), "") << block;
    expect(block, {.experts = with(experts, 7, 1, 4), .selection = {}},
           concat("forced experts of block ", block, ", token 7: expert 4 of 4"));
    expect(block, {.experts = with(experts, 39, 0, -1), .selection = {}}, "token 39: expert -1");
    expect(block, {.experts = with(experts, 7, 1, 1), .selection = {}}, "expert 1 twice");
  }
  expect(2, {.experts = experts.narrow(0, 0, 39), .selection = {}}, "expected shape [40, 2]");
  expect(2, {.experts = experts.to(at::kInt), .selection = {}}, "expected I64");
  expect(1, {.experts = {}, .selection = selection.narrow(1, 0, 3)}, "expected shape [40, 4]");
  expect(1, {.experts = {}, .selection = selection.to(at::kLong)}, "expected I32");
  expect(1, {.experts = {}, .selection = with(selection, 6, 0, 1)},
         "block 1, token 6: compressed block 1 of 1 visible ones");
  expect(1, {.experts = {}, .selection = with(selection, 9, 0, -2)}, "compressed block -2");
  expect(1, {.experts = {}, .selection = with(selection, 9, 1, 0)}, "0 behind 0");
  expect(1, {.experts = {}, .selection = with(selection, 9, 2, 1)}, "token 9: blocks behind a -1");
  expect(1, {.experts = {}, .selection = with(selection, 3, 0, -1)},
         "token 3: none of 1 visible blocks");
  expect(2, {.experts = {}, .selection = selection}, "block 2 is no CSA layer");
  expect(config.n_blocks(), {.experts = {}, .selection = {}},
         "forced choices of 6 blocks, the model has 5");
  EXPECT_NE(message(1, {.experts = {}, .selection = selection}, AttentionMode::kDense)
                .find("attends to every block"),
            std::string::npos);
}

}  // namespace
}  // namespace hadal::model
