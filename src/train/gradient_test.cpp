// The whole small model in float64 against central differences: main, MTP and balance loss in every
// attention mode, and who learns from what (model.md 17.5).
#include <cmath>
#include <cstdio>
#include <map>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/init.h"
#include "testing/finite_differences.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"
#include "train/objective.h"
#include "train/schedule.h"

namespace hadal::train {
namespace {

using model::AttentionMode;
using testing::TensorList;

constexpr double kBalanceWeight = 0.3;  // large enough to be seen among the others

model::ModelConfig config() {
  model::ModelConfig c = testing::tiny_config();
  c.vocab_size = 48;
  c.dim = 24;
  c.n_layers = 3;
  c.n_hash_layers = 1;
  c.compress_ratios = {0, 4, 16, 0};
  c.index_topk = 3;  // of up to 7 blocks: the choice matters
  c.window_size = 8;
  return c;
}

PackedRows rows() {
  PackedRows packed{
      .rows = 2, .row_length = 36, .tokens = {}, .scored = {}, .sample_lengths = {29, 7, 36}};
  at::manual_seed(5);
  const at::Tensor ids = at::randint(48, {72}, at::kInt);
  packed.tokens.assign(ids.data_ptr<int32_t>(), ids.data_ptr<int32_t>() + ids.numel());
  packed.scored.assign(packed.tokens.size(), 1);
  packed.scored[10] = packed.scored[40] = 0;
  return packed;
}

bool is_indexer(const model::Parameter& p) { return p.name.find(".indexer.") != std::string::npos; }

struct Whole {
  testing::OneAtenThread one_thread;
  model::Transformer model = testing::random_model(config(), 4, at::kDouble);
  MicroBatch micro{rows(), at::Device(at::kCPU)};
  StepCounts counts;
  ObjectiveParams params;

  explicit Whole(AttentionMode mode) {
    counts.add(micro, model.config());
    params = {.mtp_weight = 0.3,
              .balance_weight = kBalanceWeight,
              .index_weight = 1.0,
              .mode = mode,
              .numerics = ops::Numerics::kIdeal};
  }

  /// The loss's parts as they are weighted: those that the mode differentiates.
  TensorList losses() const {
    StepMeasures measures;
    accumulate(model, micro, counts, params, measures);
    TensorList parts;
    if (params.language_loss()) {
      parts = {measures.main_loss, measures.mtp_loss, measures.balance_loss};
    }
    if (params.index_loss()) parts.push_back(measures.index_loss);
    return parts;
  }
  TensorList weights() const {
    const auto weight = [](double w) { return at::full({}, w, at::kDouble); };
    TensorList result;
    if (params.language_loss()) {
      result = {weight(1.0), weight(params.mtp_weight), weight(params.balance_weight)};
    }
    if (params.index_loss()) result.push_back(weight(params.index_weight));
    return result;
  }

  /// Every discrete choice of the pass: experts, selected blocks, clamped values.
  TensorList choices() const {
    TensorList result;
    model::ForwardContext context;
    context.batch = &micro.batch;
    context.numerics = params.numerics;
    context.mode = params.mode;
    const double limit = model.config().swiglu_limit;
    context.request = {.experts = true, .swiglu = true, .selection = true};
    model::ForwardOutput output = model.forward(micro.ids, context);
    output.aux.push_back(model.mtp(output.streams, micro.next_ids, context).aux);
    for (const model::BlockAux& aux : output.aux) {
      result.push_back(aux.moe.routing.experts);
      if (aux.attn.selection.defined()) result.push_back(aux.attn.selection);
      for (const model::SwigluInput& input : aux.moe.swiglu) {
        result.push_back(input.gate > limit);
        result.push_back(input.up > limit);
        result.push_back(input.up < -limit);
      }
    }
    return result;
  }

  std::vector<testing::DifferenceVariable> differentiate() {
    model::require_gradients(model);
    losses();
    std::vector<testing::DifferenceVariable> variables;
    model.visit([&](model::Parameter& p) {
      if (!p.trainable()) return;
      variables.push_back(
          {.name = p.name, .value = p.value.detach().contiguous(), .grad = p.value.grad()});
      // The same storage without autograd: what the differences move is what the model reads.
      p.value = variables.back().value;
    });
    return variables;
  }
};

/// The indexer's inputs and targets are detached: its loss moves with the backbone, by design
/// without a gradient. So the backbone is compared with the language losses and the indexer with
/// its own.
struct Half {
  const char* name;
  std::vector<testing::DifferenceVariable> variables;
  TensorList weights;
};

std::vector<Half> halves_of(Whole& whole) {
  Half backbone{.name = "backbone", .variables = {}, .weights = whole.weights()},
      indexer{.name = "indexer", .variables = {}, .weights = whole.weights()};
  if (whole.params.index_loss()) {
    backbone.weights.back() = at::zeros({}, at::kDouble);
  }
  for (size_t i = 0; whole.params.language_loss() && i < 3; ++i) {
    indexer.weights[i] = at::zeros({}, at::kDouble);
  }
  for (const testing::DifferenceVariable& v : whole.differentiate()) {
    const bool own = v.name.find(".indexer.") != std::string::npos;
    // In warm-up the backbone, in the dense stage the indexer is not trained.
    if (v.grad.defined()) (own ? indexer : backbone).variables.push_back(v);
  }
  std::vector<Half> halves;
  if (!backbone.variables.empty()) halves.push_back(std::move(backbone));
  if (!indexer.variables.empty()) halves.push_back(std::move(indexer));
  return halves;
}

std::string case_name(const ::testing::TestParamInfo<AttentionMode>& mode) {
  return attention_mode_name(mode.param);
}

class WholeModel : public ::testing::TestWithParam<AttentionMode> {};

TEST_P(WholeModel, GradientsAreDifferences) {
  Whole whole(GetParam());
  const std::vector<Half> halves = halves_of(whole);
  EXPECT_EQ(halves.size(), GetParam() == AttentionMode::kSparse ? 2u : 1u);
  for (const Half& half : halves) {
    // The indexer has few tensors: more entries of each.
    testing::compare_differences(
        concat(half.name, ", ", attention_mode_name(GetParam())), half.variables,
        [&] { return whole.losses(); }, half.weights,
        {.relative = 2e-5, .absolute = 2e-9, .samples = half.variables.size() < 20 ? 12 : 2},
        [&] { return whole.choices(); });
  }
}

// The gradient in random directions through all parameters at once: no entry is left out.
TEST_P(WholeModel, GradientsAreDifferencesInADirection) {
  Whole whole(GetParam());
  const std::vector<Half> halves = halves_of(whole);
  const at::NoGradGuard no_grad;
  at::manual_seed(12);
  int64_t skipped = 0, checked = 0;
  double worst = 0.0;
  for (int trial = 0; trial < 8; ++trial) {
    for (const Half& half : halves) {
      TensorList directions;
      double expected = 0.0;
      for (const testing::DifferenceVariable& v : half.variables) {
        directions.push_back(at::randn_like(v.value));
        expected += (v.grad * directions.back()).sum().item<double>();
      }
      const auto move = [&](double step) {
        for (size_t i = 0; i < directions.size(); ++i) {
          half.variables[i].value.add_(directions[i], step);
        }
      };
      constexpr double kStep = 1e-7;
      move(kStep);
      const TensorList plus = whole.losses(), plus_choices = whole.choices();
      move(-2.0 * kStep);
      const TensorList minus = whole.losses(), minus_choices = whole.choices();
      move(kStep);
      bool same = true;
      for (size_t i = 0; i < plus_choices.size(); ++i) {
        same = same && at::equal(plus_choices[i], minus_choices[i]);
      }
      if (!same) {
        ++skipped;
        continue;
      }
      ++checked;
      double found = 0.0;
      for (size_t i = 0; i < plus.size(); ++i) {
        found += ((plus[i] - minus[i]) * half.weights[i]).sum().item<double>() / (2.0 * kStep);
      }
      const double error = std::abs(found - expected) / std::max(0.1, std::abs(expected));
      EXPECT_LE(error, 1e-5) << half.name << " " << trial;
      worst = std::max(worst, error);
    }
  }
  EXPECT_GT(checked, skipped);
  std::printf("%s: %lld directions, %lld skipped, worst %.1e\n", attention_mode_name(GetParam()),
              static_cast<long long>(checked), static_cast<long long>(skipped), worst);
}

INSTANTIATE_TEST_SUITE_P(Modes,
                         WholeModel,
                         ::testing::Values(AttentionMode::kDense,
                                           AttentionMode::kIndexerWarmup,
                                           AttentionMode::kSparse),
                         case_name);

/// Names of the parameters whose gradient is not exactly zero.
std::vector<std::string> moved(Whole& whole, bool indexer) {
  std::vector<std::string> names;
  whole.model.visit([&](model::Parameter& p) {
    const at::Tensor& grad = p.value.grad();
    const bool any = grad.defined() && grad.abs().max().item<double>() != 0.0;
    if (p.trainable() && is_indexer(p) == indexer && any) names.push_back(p.name);
  });
  return names;
}

std::vector<std::string> all_of(const Whole& whole, bool indexer) {
  std::vector<std::string> names;
  whole.model.visit([&](const model::Parameter& p) {
    if (p.trainable() && is_indexer(p) == indexer) names.push_back(p.name);
  });
  return names;
}

TEST(WhoLearns, TheIndexerLearnsNothingFromTheLanguageLoss) {
  for (const AttentionMode mode : {AttentionMode::kDense, AttentionMode::kSparse}) {
    Whole whole(mode);
    whole.params.index_weight = 0.0;
    model::require_gradients(whole.model);
    whole.losses();
    EXPECT_TRUE(moved(whole, true).empty());
    EXPECT_EQ(moved(whole, false).size(), all_of(whole, false).size());
  }
}

TEST(WhoLearns, TheBackboneLearnsNothingFromTheIndexersLoss) {
  // Warm-up differentiates the indexer's loss alone.
  Whole warmup(AttentionMode::kIndexerWarmup);
  model::require_gradients(warmup.model);
  warmup.losses();
  EXPECT_TRUE(moved(warmup, false).empty());
  EXPECT_EQ(moved(warmup, true).size(), all_of(warmup, true).size());
  // In sparse training the backbone's gradients are the same bits whatever the indexer's weight.
  std::vector<at::Tensor> grads[2];
  for (const int run : {0, 1}) {
    Whole whole(AttentionMode::kSparse);
    whole.params.index_weight = run == 0 ? 0.0 : 50.0;
    model::require_gradients(whole.model);
    whole.losses();
    whole.model.visit([&](model::Parameter& p) {
      if (p.trainable() && !is_indexer(p)) grads[run].push_back(p.value.grad());
    });
  }
  ASSERT_EQ(grads[0].size(), grads[1].size());
  for (size_t i = 0; i < grads[0].size(); ++i) EXPECT_TRUE(at::equal(grads[0][i], grads[1][i]));
}

// With a choice of every block sparse attention is dense attention, and so are the losses.
TEST(WhoLearns, SelectingEveryBlockIsDense) {
  TensorList losses[2];
  for (const AttentionMode mode : {AttentionMode::kIndexerWarmup, AttentionMode::kSparse}) {
    model::ModelConfig c = config();
    c.index_topk = 9;
    Whole whole(mode);
    whole.model = testing::random_model(c, 4, at::kDouble);
    StepMeasures measures;
    const at::NoGradGuard no_grad;
    accumulate(whole.model, whole.micro, whole.counts, whole.params, measures);
    losses[mode == AttentionMode::kSparse] = {measures.main_loss, measures.mtp_loss,
                                              measures.index_loss};
  }
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_NEAR(losses[0][i].item<double>(), losses[1][i].item<double>(), 1e-12) << i;
  }
}

// model.md 17.7: without the MTP loss the main loss's gradients are those of a run that never ran
// the block.
TEST(WhoLearns, MtpWeightZeroIsNoMtp) {
  Whole with(AttentionMode::kDense), without(AttentionMode::kDense);
  with.params.mtp_weight = 0.0;
  with.params.balance_weight = without.params.balance_weight = 0.0;
  model::ModelConfig c = config();
  c.n_mtp_layers = 0;
  c.compress_ratios.pop_back();
  model::Transformer shorter(c);
  std::map<std::string, at::Tensor> values, grads;
  with.model.visit([&](model::Parameter& p) { values[p.name] = p.value; });
  shorter.visit([&](model::Parameter& p) { p.value = values.at(p.name).clone(); });
  without.model = std::move(shorter);
  model::require_gradients(with.model);
  model::require_gradients(without.model);
  with.counts.index_queries.clear();
  StepMeasures a, b;
  accumulate(with.model, with.micro, with.counts, with.params, a);
  accumulate(without.model, without.micro, without.counts, without.params, b);
  with.model.visit([&](model::Parameter& p) { grads[p.name] = p.value.grad(); });
  without.model.visit([&](model::Parameter& p) {
    if (p.value.grad().defined()) {
      EXPECT_TRUE(at::equal(p.value.grad(), grads.at(p.name))) << p.name;
    }
  });
}

// FP32 masters behind official storage: the rounded values compute, the gradient is the identity.
TEST(RoundedMasters, GradientIsStraightThrough) {
  at::manual_seed(6);
  for (const model::Storage storage :
       {model::Storage::kFp8, model::Storage::kFp4, model::Storage::kBf16}) {
    for (const ops::Numerics numerics : {ops::Numerics::kReleased, ops::Numerics::kBf16}) {
      model::Parameter p;
      p.name = "w";
      p.storage = storage;
      p.shape = {130, 160};
      p.value = at::randn({130, 160}).requires_grad_(true);
      const at::Tensor operand = p.operand(numerics);
      EXPECT_EQ(operand.scalar_type(), at::kBFloat16);
      EXPECT_FALSE(at::equal(operand.detach().to(at::kFloat), p.value.detach()));
      // BF16 values, so that the cast of the gradient itself rounds nothing.
      const at::Tensor seed = at::randn({130, 160}).to(at::kBFloat16);
      (operand * seed).sum().backward();
      EXPECT_TRUE(at::equal(p.value.grad(), seed.to(at::kFloat)))
          << static_cast<int>(storage) << " " << ops::numerics_name(numerics);
    }
  }
}

}  // namespace
}  // namespace hadal::train
