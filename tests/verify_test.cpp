// The model against what the official code computed, where the recorded checkpoints lie beside the
// project.
#include "checkpoint/verify.h"

#include <filesystem>
#include <string>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "checkpoint/load_model.h"

namespace hadal::checkpoint {
namespace {

class Recorded : public ::testing::TestWithParam<const char*> {};

TEST_P(Recorded, EveryKeyHolds) {
  const std::string folder = concat(HADAL_SOURCE_DIR, "/../shared/golden/", GetParam());
  if (!std::filesystem::exists(folder))
    GTEST_SKIP() << "the recorded checkpoint " << GetParam() << " is absent";
  VerifyOptions options{
      .folder = folder, .expected = {}, .numerics = {}, .gradients = false, .max_abs = {}};
  options.gradients = std::filesystem::exists(folder + "/grad.safetensors");
  int lines = 0, identical_rows = -1;
  verify(options, [&](const VerifyLine& line) {
    ++lines;
    EXPECT_TRUE(line.pass) << line.key << ": max " << line.max << ", mean " << line.mean << ", "
                           << line.note;
    EXPECT_FALSE(line.skipped) << line.key << ": " << line.note;
    if (line.key == "prefill.layers.0.out")
      sscanf(line.note.c_str(), "identical rows %d", &identical_rows);
  });
  EXPECT_GE(lines, 13);
  if (std::string(GetParam()) == "fp8-fp4-smooth") {
    EXPECT_GE(identical_rows, 19);
  }
}

TEST_P(Recorded, PackedWeightsGiveTheBitsOfDenseOnes) {
  const std::string folder = concat(HADAL_SOURCE_DIR, "/../shared/golden/", GetParam());
  if (!std::filesystem::exists(folder))
    GTEST_SKIP() << "the recorded checkpoint " << GetParam() << " is absent";
  const auto source = OfficialCheckpoint::open(folder);
  const ops::Numerics numerics = default_numerics(source);
  const at::NoGradGuard no_grad;
  at::Tensor logits[2];
  for (const Held held : {Held::kPacked, Held::kDense}) {
    const model::Transformer model = load_model(source, numerics, held);
    int64_t packed = 0;
    model.visit([&](const model::Parameter& p) { packed += p.packed && !p.value.defined(); });
    EXPECT_EQ(packed > 0, held == Held::kPacked);
    const ops::Batch batch({40}, {0}, at::kCPU);
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics;
    const at::Tensor streams = model.forward(at::arange(40), context);
    logits[held == Held::kDense] = model.logits(model.head_input(streams, numerics), numerics);
  }
  EXPECT_TRUE(at::equal(logits[0], logits[1]));
}

INSTANTIATE_TEST_SUITE_P(Golden,
                         Recorded,
                         ::testing::Values("ideal-f32", "fp8-fp4-smooth", "fp8-fp4"),
                         [](const auto& param_info) {
                           std::string name = param_info.param;
                           for (char& c : name) c = c == '-' ? '_' : c;
                           return name;
                         });

}  // namespace
}  // namespace hadal::checkpoint
