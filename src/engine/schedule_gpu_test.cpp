// E1 of the engine on a GPU, where steps are recorded graphs or are not, and hits come from memory
// or disk: the full logits that every token was drawn from are the bits of the request alone. See
// schedule_test.cpp for what a schedule is.
//   HADAL_SCHEDULES       schedules of small models, 100 in all unless it says otherwise
//   HADAL_FLASH_SCHEDULES of V4-Flash's widths, 10 unless it says otherwise; 0: none
#include <cstdlib>
#include <iostream>
#include <ostream>
#include <string>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/init.h"
#include "model/presets.h"
#include "model/random_weights.h"
#include "testing/schedules.h"
#include "testing/tiny_model.h"

namespace hadal::engine {
namespace {

using ops::Numerics;

struct Setup {
  const char* name;
  Numerics numerics;
  bool wide;             ///< heads of the official width, which the attention kernel reads
  int64_t share;         ///< of a hundred schedules
  bool drafter = false;  ///< of DSpark, in place of the MTP block
};
void PrintTo(const Setup& setup, std::ostream* out) { *out << setup.name; }

class GpuSchedules : public ::testing::TestWithParam<Setup> {
 protected:
  void SetUp() override {
    if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "no CUDA device";
  }
  /// Matrices as the Hopper kernels read them, which alone keep a token's bits in any company.
  static model::Transformer make() {
    model::ModelConfig config = testing::small_config();
    config.expert_dtype = model::ExpertDtype::kFp4;
    if (GetParam().wide) {
      config.head_dim = 512;
      config.n_heads = 64;
      config.o_groups = 8;
      config.index_n_heads = 8;
    }
    if (GetParam().drafter) config = testing::with_drafter(config);
    const Numerics numerics = GetParam().numerics;
    model::Transformer model(testing::random_model(config, 21, at::kFloat));
    model.visit([&](model::Parameter& p) {
      const bool product = p.is_matrix() || p.kind == model::ParamKind::kHead;
      if (product || p.kind == model::ParamKind::kEmbedding)
        p.value = p.operand(numerics).contiguous();
      if (!product) return;
      const ops::Weight dense(p.kind == model::ParamKind::kGroups
                                  ? p.value.reshape({p.units, -1, p.value.size(-1)})
                                  : p.value);
      const bool codes = numerics == Numerics::kReleased;
      auto packed = dense.to_sm90(codes ? p.storage : model::Storage::kBf16, p.role);
      // No answer depends on the heads of a drafter, of which one is a single row.
      if (!packed && p.name.starts_with("mtp.")) return;
      ASSERT_TRUE(packed.has_value()) << p.name;
      p.hold(std::move(*packed));
    });
    model::move_to(model, at::kCUDA);
    return model;
  }
};

TEST_P(GpuSchedules, GiveTheLogitsOfTheRequestAlone) {
  const model::Transformer model = make();
  if (HasFatalFailure()) return;
  const int64_t wanted = testing::schedules_wanted(100) * GetParam().share / 100;
  testing::Schedules schedules(model, GetParam().numerics,
                               {.num_requests = 18,
                                .max_company = 16,
                                .max_answer = 16,
                                .small_memory = 5,
                                .device = at::kCUDA},
                               31);
  for (int64_t i = 0; i < wanted && !HasFatalFailure(); ++i) schedules.run();
  const testing::ScheduleCounts& counts = schedules.counts();
  std::cout << "  " << counts.to_string() << "\n";
  EXPECT_EQ(counts.schedules, wanted);
  if (wanted < 20) return;
  EXPECT_GT(counts.preempted, 0);
  EXPECT_GT(counts.cached, 0);
  EXPECT_GT(counts.scored, 0);
  EXPECT_GT(counts.drafted, 0);
  EXPECT_GT(counts.largest_company, 8);
  EXPECT_GT(counts.full, 0);
  EXPECT_GT(counts.periodic, 0);
  EXPECT_GT(counts.zero, 0);
}

INSTANTIATE_TEST_SUITE_P(Numerics,
                         GpuSchedules,
                         ::testing::Values(Setup{"bf16", Numerics::kBf16, false, 30},
                                           Setup{"released", Numerics::kReleased, false, 40},
                                           Setup{"released_wide", Numerics::kReleased, true, 30},
                                           Setup{"released_drafter", Numerics::kReleased, false, 19,
                                                 true}),
                         [](const auto& test) { return std::string(test.param.name); });

// Four layers (windows, CSA, HCA) and the MTP block; prompts are long enough that the indexer has
// more blocks than it may choose.
TEST(GpuSchedulesOfFlash, GiveTheLogitsOfTheRequestAlone) {
  if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "no CUDA device";
  const char* text = std::getenv("HADAL_FLASH_SCHEDULES");
  const int64_t wanted = text == nullptr ? 10 : std::atoll(text);
  if (wanted == 0) GTEST_SKIP() << "HADAL_FLASH_SCHEDULES is 0";
  model::ModelConfig config = model::deepseek_v4_flash();
  config.n_layers = 4;
  config.compress_ratios = {0, 0, 4, 128, 0};
  model::Transformer model(config);
  model::fill_random_packed(model, at::kCUDA, 5);
  constexpr int64_t kContext = 16384;
  testing::Schedules schedules(model, Numerics::kReleased,
                               {.num_requests = 8,
                                .max_company = 8,
                                .shared = 12000,
                                .max_own = 4000,
                                .max_answer = 20,
                                .small_memory = 150,
                                .large_memory = 500,
                                .max_context = kContext,
                                .max_chunk = 4096,
                                .scores = false,
                                .device = at::kCUDA},
                               32);
  for (int64_t i = 0; i < wanted && !::testing::Test::HasFatalFailure(); ++i) schedules.run();
  const testing::ScheduleCounts& counts = schedules.counts();
  std::cout << "  " << counts.to_string() << "\n";
  EXPECT_EQ(counts.schedules, wanted);
  EXPECT_GT(counts.tokens, 0);
  EXPECT_GT(counts.cached, 0);
}

}  // namespace
}  // namespace hadal::engine
