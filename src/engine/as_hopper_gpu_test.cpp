// A card against a CPU in its place (AsHopperGuard): every value of a forward pass, bit for bit. A
// failure names the first value that differs: its step, block and what it is.
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "checkpoint/load_model.h"
#include "model/init.h"
#include "testing/as_hopper.h"
#include "testing/tiny_model.h"

namespace hadal::engine {
namespace {

using ops::Numerics;
using testing::first_difference;
using testing::packed_model;
using testing::plain_logits;
using testing::random_tokens;
using testing::RunsOn;
using testing::traced_pass;
using testing::TracedPass;

class AsHopperOnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::globalContext().hasCUDA()) GTEST_SKIP() << "no CUDA device";
  }
  /// The same steps on both; `here` and `there` hold the same weights.
  static void expect_equal(const model::Transformer& here,
                           const model::Transformer& there,
                           Numerics numerics,
                           const std::vector<int64_t>& tokens,
                           int64_t chunk) {
    const TracedPass twin = traced_pass(here, numerics, tokens, chunk, RunsOn::kAsHopper),
                     card = traced_pass(there, numerics, tokens, chunk, RunsOn::kCard);
    EXPECT_EQ(first_difference(card, twin), "")
        << "card instead of twin; " << ops::numerics_name(numerics) << ", steps of " << chunk;
    EXPECT_TRUE(at::equal(plain_logits(there, numerics, tokens, chunk, RunsOn::kCard), twin.logits))
        << "in a pass at which nobody looks";
  }
  static void expect_model(const model::ModelConfig& config, Numerics numerics, int64_t count) {
    const model::Transformer here = packed_model(config, numerics, 21);
    model::Transformer there = packed_model(config, numerics, 21);
    model::move_to(there, at::kCUDA);
    const auto tokens = random_tokens(count, config.vocab_size, 6);
    for (const int64_t chunk : {count, int64_t{37}}) {
      SCOPED_TRACE(chunk);
      expect_equal(here, there, numerics, tokens, chunk);
    }
    const auto few = std::vector<int64_t>(tokens.begin(), tokens.begin() + 40);
    expect_equal(here, there, numerics, few, 1);
  }
  static model::ModelConfig small() {
    model::ModelConfig config = testing::small_config();
    config.expert_dtype = model::ExpertDtype::kFp4;
    return config;
  }
  static model::ModelConfig wide() {
    model::ModelConfig config = small();
    config.head_dim = 512;
    config.n_heads = 64;
    config.o_groups = 8;
    config.index_n_heads = 8;
    return config;
  }
};

TEST_F(AsHopperOnGpu, NarrowHeadsInReleased) { expect_model(small(), Numerics::kReleased, 300); }
TEST_F(AsHopperOnGpu, NarrowHeadsInBf16) { expect_model(small(), Numerics::kBf16, 300); }
TEST_F(AsHopperOnGpu, WideHeadsInReleased) { expect_model(wide(), Numerics::kReleased, 200); }
TEST_F(AsHopperOnGpu, WideHeadsInBf16) { expect_model(wide(), Numerics::kBf16, 200); }

// HADAL_AS_HOPPER_MODEL names another checkpoint folder.
TEST_F(AsHopperOnGpu, ACheckpoint) {
  const char* named = std::getenv("HADAL_AS_HOPPER_MODEL");
  const std::string folder = named != nullptr ? named : "models/hadal-nano";
  if (!std::filesystem::exists(folder + "/config.json")) GTEST_SKIP() << "no " << folder;
  const auto source = checkpoint::OfficialCheckpoint::open(folder);
  for (const Numerics numerics : {Numerics::kReleased, Numerics::kBf16}) {
    const auto load = [&](at::Device device) {
      return checkpoint::load_model(source, numerics,
                                    {.held = checkpoint::Held::kAccelerator, .device = device});
    };
    const model::Transformer here = load(at::kCPU), there = load(at::kCUDA);
    const auto tokens = random_tokens(512, source.config().vocab_size, 7);
    expect_equal(here, there, numerics, tokens, 512);
    expect_equal(here, there, numerics, tokens, 100);
    expect_equal(here, there, numerics, {tokens.begin(), tokens.begin() + 48}, 1);
  }
}

}  // namespace
}  // namespace hadal::engine
