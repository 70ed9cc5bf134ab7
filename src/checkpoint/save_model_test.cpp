#include "checkpoint/save_model.h"

#include <cstdlib>
#include <filesystem>
#include <limits>

#include <ATen/ATen.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "checkpoint/dequantise.h"
#include "checkpoint/load_model.h"
#include "checkpoint/quantise.h"
#include "testing/kernel_checks.h"
#include "testing/tiny_model.h"

namespace hadal::checkpoint {
namespace {

using testing::same_bits;

/// Matrices whose blocks have very different sizes, maxima on and beside the edges of the formats'
/// ranges, zeros of both signs, and a ragged edge.
std::vector<at::Tensor> hard_matrices() {
  at::manual_seed(4);
  std::vector<at::Tensor> result;
  for (const auto& [rows, cols] : {std::pair{128, 128}, {130, 160}, {3, 32}, {256, 384}}) {
    const at::Tensor size =
        at::exp2(at::randint(-30, 20, {rows, cols / 32}).to(at::kFloat)).repeat_interleave(32, 1);
    result.push_back(at::randn({rows, cols}) * size);
    result.push_back(at::zeros({rows, cols}));
    for (const double edge : {448.0, 6.0, 5.0, 464.0, 1e-4, 1.0}) {
      for (const double shift : {-1.0, 0.0, 1.0}) {
        at::Tensor w = at::rand({rows, cols}) * -0.7 * edge;
        const auto limit = static_cast<float>(edge);
        w[0][0] = shift == 0.0 ? limit : std::nextafter(limit, static_cast<float>(edge + shift));
        w[1][1] = -0.0;
        result.push_back(w * 0x1p-7);
      }
    }
  }
  return result;
}

TEST(Quantise, CodesStandForTheOfficialRounding) {
  for (const at::Tensor& w : hard_matrices()) {
    const ops::StoredCodes fp8 = quantise_fp8(w, "w");
    EXPECT_TRUE(same_bits(dequantise_fp8(fp8.data, fp8.scale).to(at::kBFloat16),
                          ops::official_rounding(w, ops::OfficialStorage::kFp8)));
    const ops::StoredCodes fp4 = quantise_fp4(w, "w");
    EXPECT_TRUE(same_bits(dequantise_fp4(fp4.data, fp4.scale).to(at::kBFloat16),
                          ops::official_rounding(w, ops::OfficialStorage::kFp4)));
  }
}

TEST(Quantise, ValuesThatAreNotFiniteNameTheTensor) {
  for (const double bad :
       {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    at::Tensor w = at::ones({128, 128});
    w[5][7] = bad;
    try {
      quantise_fp8(w, "layers.0.attn.wq_a.weight");
      FAIL();
    } catch (const InputError& error) {
      EXPECT_NE(std::string(error.what()).find("layers.0.attn.wq_a.weight"), std::string::npos);
    }
    EXPECT_THROW(quantise_fp4(w, "w"), InputError);
  }
}

TEST(SaveModel, LoadsBackAsTheRoundedModel) {
  const std::string base = ::testing::TempDir() + "hadal-save-" + std::to_string(getpid());
  std::filesystem::remove_all(base);
  std::filesystem::create_directories(base);
  model::ModelConfig config = testing::small_config();
  config.quantized = true;
  config.expert_dtype = model::ExpertDtype::kFp4;
  const model::Transformer model = testing::random_model(config, 9, at::kFloat);
  save_model(model, base + "/official", {.max_shard_bytes = 1 << 20});
  save_model(model, base + "/bf16", {.format = SaveFormat::kBf16});
  EXPECT_TRUE(std::filesystem::exists(base + "/official/model.safetensors.index.json"));
  EXPECT_TRUE(std::filesystem::exists(base + "/bf16/model.safetensors"));
  EXPECT_ANY_THROW(save_model(model, base + "/bf16", {})) << "replaced an existing checkpoint";
  for (const auto& entry : std::filesystem::directory_iterator(base + "/official")) {
    EXPECT_LE(entry.file_size(), (1 << 20) + 65536) << entry.path();
  }

  const auto official = OfficialCheckpoint::open(base + "/official");
  EXPECT_EQ(official.storage(), Storage::kFp4);
  EXPECT_EQ(OfficialCheckpoint::open(base + "/bf16").storage(), Storage::kBf16);
  const model::Transformer loaded =
      load_model(official, ops::Numerics::kReleased, {.held = Held::kDense});
  std::vector<std::string> names;
  std::vector<at::Tensor> expected, found;
  model.visit([&](const model::Parameter& p) {
    names.push_back(p.name);
    expected.push_back(p.storage == model::Storage::kF32 || p.storage == model::Storage::kI64
                           ? p.value
                           : ops::official_rounding(p.value, p.storage));
  });
  loaded.visit([&](const model::Parameter& p) { found.push_back(p.value); });
  ASSERT_EQ(expected.size(), found.size());
  for (size_t i = 0; i < found.size(); ++i) {
    EXPECT_TRUE(at::equal(expected[i].to(at::kDouble), found[i].to(at::kDouble))) << names[i];
  }
  std::filesystem::remove_all(base);
}

}  // namespace
}  // namespace hadal::checkpoint
