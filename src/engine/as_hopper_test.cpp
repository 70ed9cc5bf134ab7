// A CPU in a card's place (AsHopperGuard): the forward pass made of the twins. That the card has
// the same bits is as_hopper_gpu_test.cpp.
#include "testing/as_hopper.h"

#include <vector>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/sm90.h"
#include "testing/tiny_model.h"

namespace hadal::engine {
namespace {

using ops::Numerics;
using testing::first_difference;
using testing::packed_model;
using testing::random_tokens;
using testing::RunsOn;
using testing::traced_pass;
using testing::TracedPass;

model::ModelConfig config() {
  model::ModelConfig config = testing::small_config();
  config.expert_dtype = model::ExpertDtype::kFp4;
  config.n_layers = 3;
  config.n_mtp_layers = 0;
  config.compress_ratios = {0, 4, 128};
  config.head_dim = 512;
  config.n_heads = 64;
  config.o_groups = 8;
  config.index_n_heads = 8;
  return config;
}

class AsHopper : public ::testing::TestWithParam<Numerics> {};

TEST_P(AsHopper, ATokenDoesNotKnowItsChunks) {
  const model::Transformer model = packed_model(config(), GetParam(), 21);
  const auto tokens = random_tokens(150, 256, 6);
  const TracedPass whole = traced_pass(model, GetParam(), tokens, 150, RunsOn::kAsHopper);
  for (const int64_t chunk : {1, 37, 64}) {
    const TracedPass pieces = traced_pass(model, GetParam(), tokens, chunk, RunsOn::kAsHopper);
    EXPECT_TRUE(at::equal(pieces.logits, whole.logits)) << chunk;
  }
}

INSTANTIATE_TEST_SUITE_P(Numerics, AsHopper, ::testing::Values(Numerics::kReleased));

}  // namespace
}  // namespace hadal::engine
