// A step has the same bits however its rows are cut into micro-batches, and whatever the number of
// threads (docs/decisions/0018-sums-over-tokens.md).
#include "train/step.h"

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/parallel.h"
#include "model/init.h"
#include "ops/sum_tree.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"
#include "train/schedule.h"

namespace hadal::train {
namespace {

using model::AttentionMode;
using ops::Numerics;

/// Rows [from, from + count) of a batch whose samples have unequal lengths.
PackedRows rows(int64_t from, int64_t count, int64_t length) {
  PackedRows packed{
      .rows = count, .row_length = length, .tokens = {}, .scored = {}, .sample_lengths = {}};
  for (int64_t row = from; row < from + count; ++row) {
    at::manual_seed(static_cast<uint64_t>(100 + row));
    const at::Tensor ids = at::randint(128, {length}, at::kInt);
    const auto* first = ids.const_data_ptr<int32_t>();
    packed.tokens.insert(packed.tokens.end(), first, first + length);
    const int64_t cut = 5 + 9 * row;
    packed.sample_lengths.insert(packed.sample_lengths.end(), {cut, length - cut});
  }
  packed.scored.assign(packed.tokens.size(), 1);
  if (from == 0) packed.scored[3] = 0;
  return packed;
}

using Named = std::vector<std::pair<std::string, at::Tensor>>;

/// Everything that two steps leave, for rows cut into micro-batches of these sizes.
Named two_steps(const std::vector<int64_t>& sizes,
                AttentionMode mode,
                Numerics numerics,
                int64_t row_length = 48) {
  const bool released = numerics == Numerics::kReleased || numerics == Numerics::kFp8;
  model::Transformer model = testing::random_model(
      released ? testing::mini_config() : testing::tiny_config(), 4, at::kFloat);
  model::require_gradients(model);
  Optimizer optimizer(model, {});
  std::vector<MicroBatch> batches;
  int64_t from = 0;
  for (const int64_t size : sizes) {
    batches.emplace_back(rows(from, size, row_length), at::Device(at::kCPU));
    from += size;
  }
  const StepRules rules{.objective = {.balance_weight = 0.1,
                                      .mode = mode,
                                      .numerics = numerics,
                                      .count_clamps = true},
                        .learning_rate = 1e-3,
                        .clip_norm = 1.0,
                        .router_bias_speed = 1e-3};
  Named result;
  for (int step = 0; step < 2; ++step) {
    const StepOutcome outcome = training_step(model, optimizer, batches, rules);
    const StepMeasures& m = outcome.measures;
    result.emplace_back("main", m.main_loss);
    result.emplace_back("mtp", m.mtp_loss);
    result.emplace_back("balance", m.balance_loss);
    result.emplace_back("index", m.index_loss);
    result.emplace_back("clamped", m.clamped);
    for (const at::Tensor& load : m.expert_load) result.emplace_back("load", load);
    result.emplace_back("norm", at::full({}, outcome.norm, at::kDouble));
    model.visit([&](model::Parameter& p) {
      result.emplace_back(p.name + " gradient",
                          p.value.grad().defined() ? p.value.grad().clone() : at::Tensor());
    });
  }
  model.visit([&](model::Parameter& p) { result.emplace_back(p.name, p.value.detach()); });
  return result;
}

void expect_same(const Named& a, const Named& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_EQ(a[i].second.defined(), b[i].second.defined()) << what << ": " << a[i].first;
    if (!a[i].second.defined()) continue;
    EXPECT_TRUE(testing::same_bits(a[i].second, b[i].second)) << what << ": " << a[i].first;
  }
}

class MicroBatches : public ::testing::TestWithParam<std::tuple<AttentionMode, Numerics>> {};

TEST_P(MicroBatches, AreNotSeenInTheBits) {
  const testing::OneAtenThread one_thread;
  const auto [mode, numerics] = GetParam();
  const int before = num_threads();
  set_num_threads(2);
  const Named whole = two_steps({5}, mode, numerics);
  expect_same(whole, two_steps({1, 1, 1, 1, 1}, mode, numerics), "rows alone");
  expect_same(whole, two_steps({2, 3}, mode, numerics), "2 and 3");
  set_num_threads(3);
  expect_same(whole, two_steps({4, 1}, mode, numerics), "4 and 1, three threads");
  set_num_threads(1);
  expect_same(whole, two_steps({5}, mode, numerics), "one thread");
  set_num_threads(before);
}

INSTANTIATE_TEST_SUITE_P(Modes,
                         MicroBatches,
                         ::testing::Values(std::tuple(AttentionMode::kDense, Numerics::kBf16),
                                           std::tuple(AttentionMode::kIndexerWarmup,
                                                      Numerics::kIdeal),
                                           std::tuple(AttentionMode::kSparse, Numerics::kIdeal),
                                           std::tuple(AttentionMode::kSparse, Numerics::kBf16),
                                           std::tuple(AttentionMode::kSparse, Numerics::kReleased),
                                           std::tuple(AttentionMode::kDense, Numerics::kFp8),
                                           std::tuple(AttentionMode::kSparse, Numerics::kFp8)),
                         [](const auto& c) {
                           return std::string(attention_mode_name(std::get<0>(c.param))) + "_" +
                                  ops::numerics_name(std::get<1>(c.param));
                         });

// Rows of three chunks, the last one short: sums inside a row have a tree, too.
TEST(MicroBatchesOfChunks, AreNotSeenInTheBits) {
  const testing::OneAtenThread one_thread;
  constexpr int64_t kLength = 2 * ops::kSumChunk + 44;
  const int before = num_threads();
  set_num_threads(2);
  const Named whole = two_steps({3}, AttentionMode::kSparse, Numerics::kBf16, kLength);
  set_num_threads(3);
  expect_same(whole, two_steps({1, 2}, AttentionMode::kSparse, Numerics::kBf16, kLength),
              "1 and 2, three threads");
  set_num_threads(before);
}

// The tree, by its places: leaves of a million and one add up otherwise in any other order.
TEST(StepSums, AddRowsByTheBinaryTree) {
  model::Transformer model = testing::random_model(testing::tiny_config(), 4, at::kFloat);
  model::require_gradients(model);
  const std::vector<float> leaves = {1.0f, 1e8f, -1e8f, 3.0f, 0.5f, 7.0f, 1e7f};
  StepSums sums(model);
  for (size_t i = 0; i < leaves.size(); ++i) {
    bool first = true;
    model.visit([&](model::Parameter& p) {
      if (!p.value.requires_grad()) return;
      // The second parameter has a gradient in two rows alone.
      if (first || i == 1 || i == 4) p.value.mutable_grad() = at::full_like(p.value, leaves[i]);
      first = false;
    });
    sums.add({.main_loss = at::full({}, leaves[i]),
              .mtp_loss = {},
              .balance_loss = {},
              .index_loss = {},
              .expert_load = {},
              .clamped = {}});
  }
  const StepMeasures measures = sums.finish();
  const auto l = [&](size_t i) { return leaves[i]; };
  const float expected = ((l(0) + l(1)) + (l(2) + l(3))) + ((l(4) + l(5)) + l(6));
  EXPECT_EQ(measures.main_loss.item<float>(), expected);
  EXPECT_FALSE(measures.mtp_loss.defined());
  std::vector<float> found;
  model.visit([&](model::Parameter& p) {
    if (p.value.requires_grad()) found.push_back(p.value.grad().flatten()[0].item<float>());
  });
  EXPECT_EQ(found.at(0), expected);
  EXPECT_EQ(found.at(1), l(1) + l(4));
}

}  // namespace
}  // namespace hadal::train
