// A CPU in a card's place (AsHopperGuard): the forward pass made of the twins. That the card has
// the same bits is as_hopper_gpu_test.cpp.
#include "testing/as_hopper.h"

#include <cstdio>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "ops/gemm/weight.h"
#include "ops/mhc/hyper_connection.h"
#include "ops/norm/rms_norm.h"
#include "ops/sm90.h"
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

struct Case {
  Numerics numerics;
  bool wide = false;  ///< heads of the official width
  double apart = 0;   ///< from the CPU's kernels, by choices that are the same: relative RMS
};

model::ModelConfig config_of(const Case& c) {
  model::ModelConfig config = testing::small_config();
  config.expert_dtype = model::ExpertDtype::kFp4;
  config.n_mtp_layers = 0;
  config.n_layers = 3;
  config.compress_ratios = {0, 4, 128};
  config.index_n_heads = 8;
  if (!c.wide) return config;
  config.n_layers = 2;
  config.compress_ratios = {0, 4};
  config.index_topk = 8;
  config.head_dim = 512;
  config.n_heads = 16;
  config.o_groups = 8;
  return config;
}

class AsHopper : public ::testing::TestWithParam<Case> {
 protected:
  const Case& c() const { return GetParam(); }
  /// Beyond a block of 128 and what the indexer takes without a choice.
  std::vector<int64_t> tokens() const { return random_tokens(c().wide ? 60 : 200, 256, 6); }
};

TEST_P(AsHopper, ATokenDoesNotKnowItsChunks) {
  const model::Transformer model = packed_model(config_of(c()), c().numerics, 21);
  const auto ids = tokens();
  const TracedPass whole =
      traced_pass(model, c().numerics, ids, std::ssize(ids), RunsOn::kAsHopper);
  EXPECT_TRUE(whole.logits.isfinite().all().item<bool>());
  EXPECT_TRUE(
      at::equal(plain_logits(model, c().numerics, ids, 64, RunsOn::kAsHopper), whole.logits));
  for (const int64_t chunk : {1, 37}) {
    const TracedPass pieces = traced_pass(model, c().numerics, ids, chunk, RunsOn::kAsHopper);
    EXPECT_TRUE(at::equal(pieces.logits, whole.logits)) << chunk;
    EXPECT_NE(first_difference(pieces, whole), "");  // of other steps
  }
}

TEST_P(AsHopper, TheSameChoicesGiveNearlyTheLogitsOfTheCpu) {
  const model::Transformer model = packed_model(config_of(c()), c().numerics, 21);
  const auto ids = tokens();
  const int64_t count = std::ssize(ids);
  const TracedPass cpu = traced_pass(model, c().numerics, ids, count, RunsOn::kCpu);
  const TracedPass hopper =
      traced_pass(model, c().numerics, ids, count, RunsOn::kAsHopper, cpu.choices);
  EXPECT_NE(first_difference(hopper, cpu), "");  // these are other sums
  const at::Tensor wanted = cpu.logits.to(at::kDouble),
                   apart = (hopper.logits.to(at::kDouble) - wanted).pow(2).sum(1);
  const double mean = apart.div(wanted.pow(2).sum(1)).sqrt().mean().item<double>();
  std::printf("apart %.4f in the mean of %d rows\n", mean, static_cast<int>(count));
  EXPECT_LE(mean, c().apart);
}

std::string name_of(const ::testing::TestParamInfo<Case>& test) {
  return concat(ops::numerics_name(test.param.numerics), test.param.wide ? "Wide" : "");
}

INSTANTIATE_TEST_SUITE_P(
    Numerics,
    AsHopper,
    ::testing::Values(Case{.numerics = Numerics::kReleased, .apart = 0.09},
                      Case{.numerics = Numerics::kBf16, .apart = 0.012},
                      Case{.numerics = Numerics::kReleased, .wide = true, .apart = 0.09}),
    name_of);

/// The message of what f() refuses.
template <typename F>
std::string refusal(F&& f) {
  const c10::InferenceMode inference;
  const ops::AsHopperGuard guard;
  try {
    f();
  } catch (const InputError& error) {
    return error.what();
  }
  return "nothing is refused";
}

TEST(AsHopperRefuses, WhatACardLeavesToOthers) {
  const auto rows = [](at::IntArrayRef shape) { return at::randn(shape).to(at::kBFloat16); };
  EXPECT_NE(refusal([&] {
              ops::linear(rows({3, 128}), ops::Weight(rows({64, 128})), ops::GemmRole::kBf16);
            }).find("as hopper: linear of weights [64, 128] held dense"),
            std::string::npos);
  EXPECT_NE(refusal([&] {
              ops::rms_norm(rows({3, 12}), at::ones({12}), 1e-6);
            }).find("as hopper: rms_norm"),
            std::string::npos);
  EXPECT_NE(refusal([&] {
              ops::hc_head(rows({3, 2, 128}), at::randn({2, 256}), at::zeros({2}), at::ones({1}),
                           {.sinkhorn_iters = 1, .norm_eps = 1e-6, .hc_eps = 1e-6});
            }).find("as hopper: hc_head"),
            std::string::npos);
  // FP32 is for `ideal`, which references compute.
  EXPECT_NE(refusal([&] {
              ops::rms_norm(at::randn({3, 128}), at::ones({128}), 1e-6);
            }).find("as hopper: rms_norm"),
            std::string::npos);
}

TEST(AsHopperRefuses, NothingOnceTheGuardIsGone) {
  { const ops::AsHopperGuard guard; }
  EXPECT_FALSE(ops::as_hopper());
  const at::Tensor x = at::randn({3, 12}).to(at::kBFloat16);
  EXPECT_EQ(ops::rms_norm(x, at::ones({12}), 1e-6).sizes(), x.sizes());
}

}  // namespace
}  // namespace hadal::engine
