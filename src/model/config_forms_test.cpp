#include "model/config_forms.h"

#include <filesystem>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/file.h"
#include "model/presets.h"

namespace hadal::model {
namespace {

const std::string kFixtures = HADAL_SOURCE_DIR "/tests/transformers";
const std::string kShared = HADAL_SOURCE_DIR "/../shared";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return at == std::string::npos ? text : text.replace(at, from.size(), to);
}

std::string error_of(const std::string& text) {
  try {
    parse_config(text, "c.json");
  } catch (const InputError& error) {
    return error.what();
  }
  return "no error";
}

TEST(ConfigForms, TransformersKeys) {
  const ModelConfig c = load_config(kFixtures + "/f32");
  EXPECT_EQ(c.compress_ratios, (std::vector<int64_t>{0, 4, 16, 4, 0}));
  EXPECT_EQ(c.n_hash_layers, 1);
  EXPECT_EQ(c.rope_head_dim, 8);
  EXPECT_EQ(c.rope_theta, 10000.0);
  EXPECT_EQ(c.compress_rope_theta, 160000.0);
  EXPECT_EQ(c.rope_factor, 16.0);
  EXPECT_EQ(c.original_seq_len, 256);
  EXPECT_FALSE(c.quantized);
  // The same under official keys.
  EXPECT_EQ(parse_config(to_config_json(c), "c.json"), c);
}

TEST(ConfigForms, WithoutYarnNothingIsStretched) {
  std::string text = read_file(kFixtures + "/f32/config.json");
  text = replaced(text, "\"yarn\"", "\"default\"");
  for (const char* line : {"      \"attention_factor\": 1.0,\n", "      \"beta_fast\": 32.0,\n",
                           "      \"beta_slow\": 1.0,\n", "      \"factor\": 16.0,\n",
                           "      \"original_max_position_embeddings\": 256,\n"})
    text = replaced(text, line, "");
  EXPECT_EQ(parse_config(text, "c.json").rope_factor, 1.0);
}

TEST(ConfigForms, BothFormsMustAgree) {
  const std::string text = read_file(kFixtures + "/f32/config.json");
  const auto with = [&](const std::string& more) { return replaced(text, "{", "{ " + more + ","); };
  EXPECT_EQ(error_of(with("\"compress_ratios\": [0, 4, 16, 4, 0], \"num_hash_layers\": 1")),
            "no error");
  const auto expect_error = [](const std::string& json, const std::string& message) {
    const std::string error = error_of(json);
    EXPECT_NE(error.find(message), std::string::npos) << error;
  };
  expect_error(with("\"compress_ratios\": [0, 4, 16, 0, 0]"),
               "layer_types are the ratios [0, 4, 16, 4], but compress_ratios is [0, 4, 16, 0, 0]");
  expect_error(with("\"num_hash_layers\": 2"),
               "mlp_layer_types has 1 hash_moe layers, but num_hash_layers is 2");
  expect_error(replaced(text, "\"hash_moe\",\n    \"moe\"", "\"moe\",\n    \"hash_moe\""),
               "only the first layers can be hashed");
  expect_error(replaced(text, "\"sliding_attention\"", "\"full_attention\""),
               "layer_types: expected sliding_attention");
  expect_error(replaced(text, "    \"sliding_attention\",\n", ""),
               "layer_types: 3 entries, num_hidden_layers is 4");
  expect_error(
      replaced(text, "\"compressed_sparse_attention\": 4", "\"compressed_sparse_attention\": 8"),
      "compress_rates.compressed_sparse_attention: only 4 is implemented");
  expect_error(replaced(text, "\"attention_factor\": 1.0", "\"attention_factor\": 1.277"),
               "rope_parameters.compress.attention_factor: only 1 is implemented");
  expect_error(replaced(text, "      \"attention_factor\": 1.0,\n", ""),
               "rope_parameters.compress.attention_factor: required key is missing");
  expect_error(
      replaced(text, "\"rope_theta\": 10000.0,\n  \"routed", "\"rope_theta\": 5000.0,\n  \"routed"),
      "rope_theta is 5000, but");
  expect_error(replaced(text, "\"qk_rope_head_dim\": 8", "\"qk_rope_head_dim\": 4"),
               "partial_rotary_factor is 8, but c.json: qk_rope_head_dim is 4");
}

TEST(ConfigForms, Flash0731) {
  ModelConfig expected = deepseek_v4_flash();
  expected.n_mtp_layers = 0;
  expected.compress_ratios.pop_back();
  expected.drafter = {.n_stages = 3,
                      .block_size = 5,
                      .noise_token_id = 128799,
                      .markov_rank = 256,
                      .target_layers = {40, 41, 42}};
  EXPECT_EQ(parse_config(to_config_json(expected), "c.json"), expected);
  const std::string official = kShared + "/data/dsv4-goldens/configs/V4-Flash-0731";
  if (!std::filesystem::exists(official)) GTEST_SKIP() << "official configs are absent";
  EXPECT_EQ(load_config(official), expected);
}

TEST(ConfigForms, DraftersThatCannotBe) {
  ModelConfig flash = deepseek_v4_flash();
  flash.n_mtp_layers = 0;
  flash.compress_ratios.pop_back();
  flash.drafter = {.n_stages = 3,
                   .block_size = 5,
                   .noise_token_id = 128799,
                   .markov_rank = 256,
                   .target_layers = {40, 41, 42}};
  const auto expect_error = [&](const std::string& from, const std::string& to,
                                const std::string& message) {
    const std::string error = error_of(replaced(to_config_json(flash), from, to));
    EXPECT_NE(error.find(message), std::string::npos) << error;
  };
  expect_error("[40, 41, 42]", "[]", "at least one layer");
  expect_error("[40, 41, 42]", "[41, 42, 43]", "dspark_target_layer_ids is 43, expected 0 to 42");
  expect_error("[40, 41, 42]", "[41, 41]", "layer 41 twice");
  expect_error("128799", "129280", "dspark_noise_token_id is 129280");
  expect_error("4, 0, 0, 0]", "4, 0, 4, 0]", "stages of a drafter have ratio 0, found 4");
  expect_error("4, 0, 0, 0]", "4]", "leave none behind num_hidden_layers 43");
  expect_error("\"dspark_block_size\"", "\"n_mtp_layers\": 2, \"dspark_block_size\"",
               "n_mtp_layers: 2 stages, but compress_ratios has 3 entries");
}

TEST(ConfigForms, SizesAreBoundedTogether) {
  const std::string flash = to_config_json(deepseek_v4_flash());
  const auto expect_error = [&](const std::string& json, const std::string& message) {
    const std::string error = error_of(json);
    EXPECT_NE(error.find(message), std::string::npos) << error;
  };
  expect_error(replaced(flash, "\"n_routed_experts\": 256", "\"n_routed_experts\": 1048576"),
               "n_routed_experts is 1048576, expected 1 to 16384");
  expect_error(replaced(flash, "\"hidden_size\": 4096", "\"hidden_size\": 1048576"),
               "hidden_size is 1048576, expected 1 to 131072");
  expect_error(replaced(flash, "\"n_routed_experts\": 256", "\"n_routed_experts\": 16384"),
               "n_routed_experts is 16384 in each of 44 blocks");
  expect_error(replaced(replaced(flash, "\"hidden_size\": 4096", "\"hidden_size\": 131072"),
                        "\"moe_intermediate_size\": 2048", "\"moe_intermediate_size\": 131072"),
               "parameters, expected at most");
}

}  // namespace
}  // namespace hadal::model
