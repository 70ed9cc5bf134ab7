// Annotated tensors computed again by the backward pass: any subset of them gives the bits of none,
// every auxiliary term is counted once, and what is computed again wrongly is found.
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/init.h"
#include "ops/tape.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"
#include "train/objective.h"
#include "train/schedule.h"

namespace hadal::train {
namespace {

using model::AttentionMode;
using ops::Numerics;
using ops::TensorLabel;

PackedRows rows() {
  PackedRows packed{
      .rows = 2, .row_length = 24, .tokens = {}, .scored = {}, .sample_lengths = {17, 7, 24}};
  at::manual_seed(5);
  const at::Tensor ids = at::randint(128, {48}, at::kInt);
  packed.tokens.assign(ids.data_ptr<int32_t>(), ids.data_ptr<int32_t>() + ids.numel());
  packed.scored.assign(packed.tokens.size(), 1);
  return packed;
}

/// Labels of all annotated tensors, and how often functions ran again.
struct Census final : ops::TapeObserver {
  std::vector<TensorLabel> labels;
  std::map<int64_t, TensorLabel> of;
  std::map<int64_t, int64_t> again;

  void ran(int64_t, const std::vector<int64_t>&, const std::vector<Result>& results) override {
    for (const Result& result : results) of[result.slot] = result.label;
  }
  void annotated(int64_t slot) override { labels.push_back(of.at(slot)); }
  void needed(int64_t) override {}
  void released(int64_t) override {}
  void runs_again(int64_t function) override { ++again[function]; }
  void ran_again(int64_t, double) override {}
};

class Passes {
 public:
  Passes(at::ScalarType type, AttentionMode mode, Numerics numerics)
      : model_(testing::random_model(testing::mini_config(), 4, type)),
        micro_(rows(), at::Device(at::kCPU)) {
    model::require_gradients(model_);
    counts_.add(micro_, model_.config());
    params_ = {.mtp_weight = 0.3,
               .balance_weight = 0.2,
               .index_weight = 0.7,
               .mode = mode,
               .numerics = numerics,
               .count_clamps = true};
  }

  /// Measures and gradients, as one list with names.
  std::vector<std::pair<std::string, at::Tensor>> run(
      const std::shared_ptr<const ops::TapeOptions>& tape) {
    const testing::OneAtenThread one_thread;
    params_.tape = tape;
    StepSums sums(model_);
    accumulate(model_, micro_, counts_, params_, sums);
    StepMeasures measures = sums.finish();
    std::vector<std::pair<std::string, at::Tensor>> all{{"main", measures.main_loss},
                                                        {"mtp", measures.mtp_loss},
                                                        {"balance", measures.balance_loss},
                                                        {"index", measures.index_loss},
                                                        {"clamped", measures.clamped}};
    for (const at::Tensor& load : measures.expert_load) all.emplace_back("load", load);
    model_.visit([&](model::Parameter& parameter) {
      all.emplace_back(parameter.name, parameter.value.grad());
      parameter.value.mutable_grad() = at::Tensor();
    });
    return all;
  }

  std::vector<TensorLabel> annotated() {
    const auto census = std::make_shared<Census>();
    run(std::make_shared<ops::TapeOptions>(ops::TapeOptions{.observer = census}));
    const std::set<TensorLabel> labels(census->labels.begin(), census->labels.end());
    return {labels.begin(), labels.end()};
  }

 private:
  model::Transformer model_;
  MicroBatch micro_;
  StepCounts counts_;
  ObjectiveParams params_;
};

void expect_same(const std::vector<std::pair<std::string, at::Tensor>>& a,
                 const std::vector<std::pair<std::string, at::Tensor>>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].second.defined(), b[i].second.defined()) << a[i].first;
    if (a[i].second.defined()) {
      EXPECT_TRUE(at::equal(a[i].second, b[i].second)) << a[i].first;
    }
  }
}

class TensorRecompute
    : public ::testing::TestWithParam<std::tuple<AttentionMode, Numerics, at::ScalarType>> {};

TEST_P(TensorRecompute, AnySubsetGivesTheBitsOfNone) {
  const auto [mode, numerics, type] = GetParam();
  Passes passes(type, mode, numerics);
  const auto plain = passes.run(nullptr);
  const std::vector<TensorLabel> labels = passes.annotated();
  EXPECT_GT(labels.size(), 100U);
  std::mt19937 random(17);
  // None, all, and subsets of every density.
  for (const double share : {0.0, 1.0, 0.1, 0.5, 0.9}) {
    std::set<TensorLabel> chosen;
    for (const TensorLabel& label : labels) {
      if (std::generate_canonical<double, 24>(random) < share) chosen.insert(label);
    }
    const auto census = std::make_shared<Census>();
    const auto made = passes.run(std::make_shared<ops::TapeOptions>(
        ops::TapeOptions{.drops = [&](const TensorLabel& label) { return chosen.contains(label); },
                         .verify = true,
                         .observer = census}));
    expect_same(made, plain);
    if (share == 0.0) {
      EXPECT_TRUE(census->again.empty());
    } else if (share == 1.0) {
      EXPECT_GT(census->again.size(), 10U);
    }
    // Two passes, each with its own numbers: nothing runs again twice.
    for (const auto& [function, times] : census->again) EXPECT_LE(times, 2) << function;
  }
}

INSTANTIATE_TEST_SUITE_P(
    Passes,
    TensorRecompute,
    ::testing::Values(std::tuple(AttentionMode::kDense, Numerics::kBf16, at::kFloat),
                      std::tuple(AttentionMode::kIndexerWarmup, Numerics::kReleased, at::kFloat),
                      std::tuple(AttentionMode::kSparse, Numerics::kIdeal, at::kFloat),
                      std::tuple(AttentionMode::kSparse, Numerics::kBf16, at::kFloat),
                      std::tuple(AttentionMode::kSparse, Numerics::kReleased, at::kFloat),
                      // References, whose library products must be the same ones.
                      std::tuple(AttentionMode::kSparse, Numerics::kIdeal, at::kDouble)),
    [](const auto& pass) {
      return concat(attention_mode_name(std::get<0>(pass.param)), '_',
                    ops::numerics_name(std::get<1>(pass.param)), '_',
                    std::get<2>(pass.param) == at::kDouble ? "f64" : "f32");
    });

}  // namespace
}  // namespace hadal::train
