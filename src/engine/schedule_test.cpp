// E1 of the engine: the full logits that every token was drawn from are the same bits alone and in
// any company, chunking, preemption, with hits in memory and on disk, and with drafts.
#include <iostream>
#include <memory>
#include <ostream>
#include <string>

#include <gtest/gtest.h>

#include "testing/schedules.h"
#include "testing/tiny_model.h"

namespace hadal::engine {
namespace {

using ops::Numerics;

/// Other ratios and widths: HCA blocks of 32 and 8 tokens, heads of other sizes, no dense layer
/// below, a window that is no multiple of a block.
model::ModelConfig odd_config() {
  model::ModelConfig config = testing::tiny_config();
  config.compress_ratios = {32, 4, 8, 4, 32, 0};
  config.window_size = 21;
  config.n_heads = 2;
  config.head_dim = 64;
  config.rope_head_dim = 32;
  config.index_n_heads = 2;
  config.index_topk = 5;
  config.hc_mult = 2;
  return config;
}

model::ModelConfig tiny_drafter() { return testing::with_drafter(testing::tiny_config()); }
model::ModelConfig odd_drafter() { return testing::with_drafter(odd_config()); }
model::ModelConfig small_drafter() { return testing::with_drafter(testing::small_config()); }

struct Setup {
  const char* name;
  model::ModelConfig (*config)();
  Numerics numerics;
  int num_requests = 56;
};
void PrintTo(const Setup& setup, std::ostream* out) { *out << setup.name; }

class SchedulesTest : public ::testing::TestWithParam<Setup> {};

TEST_P(SchedulesTest, GiveTheLogitsOfTheRequestAlone) {
  const Numerics numerics = GetParam().numerics;
  model::Transformer model(testing::random_model(GetParam().config(), 21, at::kFloat));
  model.visit([&](model::Parameter& p) {
    const bool rounded = p.is_matrix() || p.kind == model::ParamKind::kEmbedding ||
                         p.kind == model::ParamKind::kHead;
    if (rounded && numerics != Numerics::kIdeal) p.value = p.operand(numerics).contiguous();
  });
  const int64_t wanted = testing::schedules_wanted(50) / 5;
  testing::Schedules schedules(model, numerics, {.num_requests = GetParam().num_requests}, 77);
  for (int64_t i = 0; i < wanted && !HasFatalFailure(); ++i) schedules.run();
  const testing::ScheduleCounts& counts = schedules.counts();
  std::cout << "  " << counts.to_string() << "\n";
  if (wanted < 10) return;
  EXPECT_GT(counts.preempted, 0);
  EXPECT_GT(counts.cached, 0);
  EXPECT_GT(counts.scored, 0);
  EXPECT_GT(counts.drafted, 0);
  EXPECT_GT(counts.largest_company, 16);
  EXPECT_GT(counts.full, 0);
  EXPECT_GT(counts.periodic, 0);
  EXPECT_GT(counts.zero, 0);
}

INSTANTIATE_TEST_SUITE_P(
    Numerics,
    SchedulesTest,
    ::testing::Values(Setup{"tiny_ideal", testing::tiny_config, Numerics::kIdeal},
                      Setup{"tiny_bf16", testing::tiny_config, Numerics::kBf16},
                      Setup{"odd_ideal", odd_config, Numerics::kIdeal},
                      Setup{"odd_bf16", odd_config, Numerics::kBf16},
                      Setup{"small_released", testing::small_config, Numerics::kReleased, 24},
                      Setup{"tiny_drafter_ideal", tiny_drafter, Numerics::kIdeal, 24},
                      Setup{"odd_drafter_bf16", odd_drafter, Numerics::kBf16, 24},
                      Setup{"small_drafter_released", small_drafter, Numerics::kReleased, 18}),
    [](const auto& test) { return std::string(test.param.name); });

}  // namespace
}  // namespace hadal::engine
