// The model against recorded outputs: small ones that lie in the tree, from an independent
// implementation (tests/golden-tiny/README.md), and what the official code computed, where those
// checkpoints lie beside the project.
#include "checkpoint/verify.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <sys/wait.h>
#include <unistd.h>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "checkpoint/load_model.h"
#include "checkpoint/safetensors.h"

namespace hadal::checkpoint {
namespace {

VerifyOptions options_for(const std::string& folder) {
  return {.folder = folder, .expected = {}, .numerics = {}, .gradients = false, .max_abs = {}};
}

/// Exit code of `hadal verify folder`.
int run_verify(const std::string& folder) {
  const int status =
      std::system(concat(HADAL_BINARY, " verify ", folder, " >/dev/null 2>&1").c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

struct Tiny {
  const char* name;
  int lines;
  // Measured, with a margin; tighter than verify's own bars.
  double max_abs;       ///< of logits
  double first_mean;    ///< mean error of the streams after the first layer
  int identical_first;  ///< of 22 rows after the first layer: a mean does not see a small rounding
                        ///< mistake, whole rows do
};

void PrintTo(const Tiny& tiny, std::ostream* out) { *out << tiny.name; }

class GoldenTiny : public ::testing::TestWithParam<Tiny> {
 protected:
  std::string folder() const {
    return concat(HADAL_SOURCE_DIR, "/tests/golden-tiny/", GetParam().name);
  }
};

TEST_P(GoldenTiny, EveryKeyHolds) {
  int lines = 0, identical_rows = 0;
  verify(options_for(folder()), [&](const VerifyLine& line) {
    ++lines;
    EXPECT_TRUE(line.pass) << line.key << ": max " << line.max << ", mean " << line.mean << ", "
                           << line.note;
    EXPECT_FALSE(line.skipped) << line.key << ": " << line.note;
    if (line.key.ends_with(".logits")) {
      EXPECT_LE(line.max, GetParam().max_abs) << line.key;
    }
    if (line.key == "prefill.layers.0.out") {
      sscanf(line.note.c_str(), "identical rows %d", &identical_rows);
    }
    std::printf("%-24s max %.2e mean %.2e %s\n", line.key.c_str(), line.max, line.mean,
                line.note.c_str());
  });
  EXPECT_EQ(lines, GetParam().lines);
  EXPECT_GE(identical_rows, GetParam().identical_first);
  EXPECT_EQ(run_verify(folder()), 0);
}

// A check that cannot fail checks nothing: every kind of weight, negated, must be noticed.
TEST_P(GoldenTiny, ABrokenWeightFails) {
  const std::string broken =
      concat(::testing::TempDir(), "golden-tiny-broken-", GetParam().name, "-", getpid());
  std::filesystem::create_directories(broken);
  for (const char* file : {"config.json", "expected.safetensors"}) {
    std::filesystem::copy_file(concat(folder(), "/", file), concat(broken, "/", file),
                               std::filesystem::copy_options::overwrite_existing);
  }
  const TensorReader reader = TensorReader::open(folder());
  const auto negated = [](const at::Tensor& x) {
    // FP4: the sign bits of both nibbles; FP8 has its sign where a byte has.
    if (x.scalar_type() == at::kChar) return at::bitwise_xor(x, -120);
    if (x.scalar_type() == at::kFloat8_e4m3fn) {
      return at::bitwise_xor(x.view(at::kByte), 128).view(at::kFloat8_e4m3fn);
    }
    if (x.scalar_type() == at::kLong) return x.flip(0);
    return at::neg(x);
  };
  const auto write = [&](const std::string& name) {
    std::vector<NamedTensor> tensors;
    for (const std::string& other : reader.names()) {
      const at::Tensor value = reader.tensor(other);
      tensors.push_back({.name = other,
                         .tensor = other == name ? negated(value).contiguous() : value,
                         .e8m0 = value.scalar_type() == at::kByte});
    }
    write_safetensors(broken + "/model.safetensors", tensors);
  };
  // Every tensor but scales and the experts behind the first.
  int checked = 0;
  std::string last;
  for (const std::string& name : reader.names()) {
    const bool scale = name.ends_with(".scale");
    const bool other_expert = name.find("experts.") != std::string::npos &&
                              name.find("experts.0.") == std::string::npos &&
                              name.find("shared_experts") == std::string::npos;
    if (scale || other_expert) continue;
    write(name);
    int failed = 0;
    verify(options_for(broken), [&](const VerifyLine& line) { failed += !line.pass; });
    EXPECT_GT(failed, 0) << name << " negated goes unnoticed";
    ++checked;
    last = name;
  }
  EXPECT_GT(checked, 40);
  EXPECT_EQ(run_verify(broken), 1) << last;
  write("");
  EXPECT_EQ(run_verify(broken), 0);
  std::filesystem::remove_all(broken);
}

INSTANTIATE_TEST_SUITE_P(InTheTree,
                         GoldenTiny,
                         ::testing::Values(Tiny{"ideal", 9, 1e-5, 1e-6, 0},
                                           Tiny{"released", 7, 0.45, 5e-3, 12}),
                         [](const auto& param_info) { return param_info.param.name; });

class Recorded : public ::testing::TestWithParam<const char*> {};

TEST_P(Recorded, EveryKeyHolds) {
  const std::string folder = concat(HADAL_SOURCE_DIR, "/../shared/golden/", GetParam());
  if (!std::filesystem::exists(folder))
    GTEST_SKIP() << "the recorded checkpoint " << GetParam() << " is absent";
  VerifyOptions options = options_for(folder);
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
  for (const Held held : {Held::kPanels, Held::kDense}) {
    const model::Transformer model = load_model(source, numerics, {.held = held});
    int64_t packed = 0;
    model.visit(
        [&](const model::Parameter& p) { packed += p.weight.defined() && !p.value.defined(); });
    EXPECT_EQ(packed > 0, held == Held::kPanels);
    const ops::Batch batch({40}, {0}, at::kCPU);
    model::ForwardContext context;
    context.batch = &batch;
    context.numerics = numerics;
    const at::Tensor streams = model.forward(at::arange(40), context).streams;
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
