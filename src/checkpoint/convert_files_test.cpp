#include "checkpoint/convert_files.h"

#include <filesystem>
#include <unistd.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "model/presets.h"

namespace hadal::checkpoint {
namespace {

class ConvertFiles : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = ::testing::TempDir() + "hadal-convert-files-" + std::to_string(getpid()) + ".json";
  }
  void TearDown() override { std::filesystem::remove(path_); }

  std::string converted(const model::ModelConfig& config, const ConfigTarget& target) const {
    write_file_atomic(path_, model::to_config_json(config));
    return converted_config(path_, config, target);
  }

  std::string path_;
};

TEST_F(ConvertFiles, TransformersFormSaysTheSame) {
  for (model::ModelConfig config : {model::deepseek_v4_flash(), model::deepseek_v4_pro()}) {
    const std::string json =
        converted(config, {.storage = Storage::kBf16, .transformers = true, .f32 = false});
    config.quantized = false;
    config.expert_dtype = model::ExpertDtype::kBf16;
    EXPECT_EQ(model::parse_config(json, "hf"), config);
    for (const char* key : {"compress_ratios", "num_hash_layers", "rope_scaling", "expert_dtype"})
      EXPECT_EQ(json.find(concat("\"", key, "\"")), std::string::npos) << key;
    write_file_atomic(path_, json);
    const std::string back = converted_config(
        path_, config, {.storage = Storage::kBf16, .transformers = false, .f32 = false});
    EXPECT_EQ(model::parse_config(back, "official"), config);
    EXPECT_EQ(back.find("layer_types"), std::string::npos);
  }
}

TEST_F(ConvertFiles, TypesOfFloatsAreNamed) {
  const std::string json = converted(
      model::deepseek_v4_flash(), {.storage = Storage::kBf16, .transformers = true, .f32 = true});
  EXPECT_NE(json.find("\"torch_dtype\": \"float32\""), std::string::npos) << json;
}

TEST_F(ConvertFiles, TwoRatiosOfHcaAreNotTransformers) {
  model::ModelConfig config = model::deepseek_v4_flash();
  config.compress_ratios[5] = 64;
  try {
    converted(config, {.storage = Storage::kBf16, .transformers = true, .f32 = false});
    FAIL();
  } catch (const InputError& error) {
    EXPECT_NE(std::string(error.what()).find("layers with 128 and with 64"), std::string::npos)
        << error.what();
  }
}

}  // namespace
}  // namespace hadal::checkpoint
