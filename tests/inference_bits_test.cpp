// The bits of inference: what this build computes is what every build before it computed, on every
// processor. tests/inference_bits.txt holds the digests; a change that is meant to change a bit
// prints the new ones (HADAL_PRINT_BITS=1) and says why in docs/decisions.
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/cpu.h"
#include "base/hash.h"
#include "checkpoint/load_model.h"
#include "model/transformer.h"
#include "nano_machine.h"
#include "ops/cache/batch.h"
#include "testing/as_hopper.h"

namespace hadal {
namespace {

using ops::Numerics;
using testing::NanoMachine;

std::map<std::string, std::string> recorded() {
  std::map<std::string, std::string> lines;
  std::ifstream file(concat(HADAL_SOURCE_DIR, "/tests/inference_bits.txt"));
  std::string name, digest;
  while (file >> name >> digest) lines[name] = digest;
  return lines;
}

void expect_recorded(const std::string& name, std::string_view bytes) {
  char digest[24];
  std::snprintf(digest, sizeof(digest), "%016llx", static_cast<unsigned long long>(fnv1a64(bytes)));
  if (std::getenv("HADAL_PRINT_BITS") != nullptr) std::printf("%s %s\n", name.c_str(), digest);
  const auto lines = recorded();
  const auto line = lines.find(name);
  ASSERT_NE(line, lines.end()) << name << " has no recorded digest";
  EXPECT_EQ(line->second, digest) << name;
}

std::string_view bytes_of(const at::Tensor& x) {
  return {static_cast<const char*>(x.const_data_ptr()),
          static_cast<size_t>(x.numel() * x.element_size())};
}

/// Logits of three sequences in one step, and what the MTP block makes of them.
void expect_logits(const std::string& name, const std::string& folder, Numerics numerics) {
  const at::NoGradGuard no_grad;
  const model::Transformer model =
      checkpoint::load_model(checkpoint::OfficialCheckpoint::open(folder), numerics);
  const std::vector<int64_t> lengths = {150, 37, 5};
  std::vector<int64_t> numbers;
  for (int64_t i = 0; i < 192; ++i)
    numbers.push_back((i * i * 31 + 17 * i + 5) % model.config().vocab_size);
  const at::Tensor ids = at::tensor(numbers, at::kLong);
  const ops::Batch batch(lengths, {0, 0, 0}, at::kCPU);
  model::ForwardContext context;
  context.batch = &batch;
  context.numerics = numerics;
  const at::Tensor streams = model.forward(ids, context).streams;
  const at::Tensor logits =
      model.logits(model.head_input(streams, numerics), numerics).to(at::kFloat).contiguous();
  expect_recorded(name, bytes_of(logits));
  if (model.config().n_mtp_layers == 0) return;
  const at::Tensor drafts =
      model.logits(model.mtp(streams, ids.roll(-1), context).head_input, numerics)
          .to(at::kFloat)
          .contiguous();
  expect_recorded(name + "-mtp", bytes_of(drafts));
}

TEST(InferenceBits, LogitsAreThoseOfEveryBuild) {
  at::set_num_threads(1);
  const std::string root = HADAL_SOURCE_DIR;
  const Isa best = current_isa();
  for (int level = 0; level <= static_cast<int>(detect_isa()); ++level) {
    SCOPED_TRACE(isa_name(static_cast<Isa>(level)));
    force_isa(static_cast<Isa>(level));
    expect_logits("golden-tiny-ideal", concat(root, "/tests/golden-tiny/ideal"), Numerics::kIdeal);
    expect_logits("golden-tiny-released", concat(root, "/tests/golden-tiny/released"),
                  Numerics::kReleased);
    // The portable kernels take a minute for the shipped model.
    if (level == 0 && best != static_cast<Isa>(0)) continue;
    for (const auto numerics : {Numerics::kIdeal, Numerics::kBf16, Numerics::kReleased}) {
      expect_logits(concat("nano-", ops::numerics_name(numerics)),
                    concat(root, "/models/hadal-nano"), numerics);
    }
  }
  force_isa(best);
}

// What a card computes, by a CPU in its place: 64 tokens of the shipped model.
TEST(InferenceBits, LogitsOfACardAreThoseOfEveryBuild) {
  const auto source =
      checkpoint::OfficialCheckpoint::open(concat(HADAL_SOURCE_DIR, "/models/hadal-nano"));
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < 64; ++i)
    ids.push_back((i * i * 31 + 17 * i + 5) % source.config().vocab_size);
  const Isa best = current_isa();
  for (const auto numerics : {Numerics::kReleased, Numerics::kBf16}) {
    const model::Transformer model =
        checkpoint::load_model(source, numerics, {.held = checkpoint::Held::kAccelerator});
    for (int level = 0; level <= static_cast<int>(detect_isa()); ++level) {
      SCOPED_TRACE(isa_name(static_cast<Isa>(level)));
      force_isa(static_cast<Isa>(level));
      const auto pass = testing::traced_pass(model, numerics, ids, 64, testing::RunsOn::kAsHopper);
      expect_recorded(concat("as-hopper-nano-", ops::numerics_name(numerics)),
                      bytes_of(pass.logits));
    }
    force_isa(best);
  }
}

TEST(InferenceBits, TwentySeededAnswersAreThoseOfEveryBuild) {
  NanoMachine machine({});
  std::vector<std::shared_ptr<testing::NanoAnswer>> answers;
  for (uint64_t seed = 0; seed < 20; ++seed) {
    engine_core::Request request;
    for (int64_t i = 0; i < 20 + static_cast<int64_t>(seed) * 7; ++i)
      request.prompt.push_back(
          i == 0 ? 0 : 300 + (i * i * 13 + static_cast<int64_t>(seed) * 101) % 7000);
    request.max_tokens = 60;
    request.ignore_eos = true;
    request.sampling.temperature = seed % 2 == 0 ? 1.0 : 0.7;
    request.sampling.top_p = seed % 3 == 0 ? 0.9 : 1.0;
    request.sampling.seed = seed;
    answers.push_back(machine.add(request));
  }
  machine.run();
  std::string tokens;
  for (const auto& answer : answers) {
    ASSERT_EQ(answer->tokens.size(), 60U) << answer->error;
    for (const int64_t token : answer->tokens) tokens += concat(token, " ");
  }
  expect_recorded("nano-answers", tokens);
}

}  // namespace
}  // namespace hadal
