#include "model/config.h"

#include <filesystem>

#include <gtest/gtest.h>

#include "base/check.h"
#include "model/presets.h"

namespace hadal::model {
namespace {

const std::string kShared = HADAL_SOURCE_DIR "/../shared";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

std::string error_of(const std::string& text) {
  try {
    parse_config(text, "c.json");
  } catch (const InputError& error) {
    return error.what();
  }
  return "no error";
}

/// An official config with one piece of its text replaced must fail with this message.
void expect_error(const std::string& from, const std::string& to, const std::string& message) {
  const std::string error = error_of(replaced(to_config_json(deepseek_v4_flash()), from, to));
  EXPECT_NE(error.find(message), std::string::npos) << to << ": " << error;
}

TEST(Config, RoundTrip) {
  ModelConfig odd = deepseek_v4_flash();
  odd.n_mtp_layers = 0;
  odd.compress_ratios.pop_back();
  odd.hc_eps = 1.25e-7;
  odd.rope_theta = 12345.5;
  odd.eos_token_id = 7;
  odd.trained_length = 4096;
  odd.quantized = false;
  odd.expert_dtype = ExpertDtype::kBf16;
  ModelConfig base = deepseek_v4_pro();
  base.expert_dtype = ExpertDtype::kFp8;
  for (const ModelConfig& config : {deepseek_v4_flash(), deepseek_v4_pro(), odd, base})
    EXPECT_EQ(parse_config(to_config_json(config), "c.json"), config);
}

TEST(Config, ReadsGoldenCheckpoints) {
  if (!std::filesystem::exists(kShared + "/golden")) GTEST_SKIP() << "golden is absent";
  const ModelConfig ideal = load_config(kShared + "/golden/ideal-f32");
  EXPECT_FALSE(ideal.quantized);
  EXPECT_EQ(ideal.compress_ratios, (std::vector<int64_t>{0, 4, 128, 4, 128, 4, 0, 0}));
  const ModelConfig smooth = load_config(kShared + "/golden/fp8-fp4-smooth");
  EXPECT_EQ(smooth.expert_dtype, ExpertDtype::kFp4);
  EXPECT_TRUE(smooth.is_hashed(smooth.n_layers));
  EXPECT_NO_THROW(smooth.check_released());
}

TEST(Config, ReadsTheTinyCheckpointButCannotRunItReleased) {
  const std::string tiny = kShared + "/data/dsv4-goldens/tiny-ckpt";
  if (!std::filesystem::exists(tiny)) GTEST_SKIP() << "tiny-ckpt is absent";
  const ModelConfig config = load_config(tiny + "/config.json");
  EXPECT_EQ(config.hc_mult, 2);
  EXPECT_THROW(config.check_released(), InputError);  // 32 - 16 is not divisible by 64
}

TEST(Config, RefusesVariants) {
  expect_error("\"torch_dtype\"", "\"engram_layers\": [1], \"torch_dtype\"",
               "Engram (V4.1) is not implemented (engram_layers)");
}

TEST(Config, UnknownKeysAreOnlyAWarning) {
  const std::string text = replaced(to_config_json(deepseek_v4_flash()), "\"torch_dtype\"",
                                    "\"something_new\": 1, \"torch_dtype\"");
  ::testing::internal::CaptureStderr();
  EXPECT_EQ(parse_config(text, "c.json"), deepseek_v4_flash());
  EXPECT_NE(::testing::internal::GetCapturedStderr().find("unknown keys: something_new"),
            std::string::npos);
}

TEST(Config, EveryArithmeticKeyIsRequired) {
  for (const char* key : {"vocab_size",
                          "hidden_size",
                          "num_hidden_layers",
                          "num_hash_layers",
                          "num_attention_heads",
                          "head_dim",
                          "qk_rope_head_dim",
                          "q_lora_rank",
                          "o_groups",
                          "o_lora_rank",
                          "sliding_window",
                          "compress_ratios",
                          "compress_rope_theta",
                          "rope_theta",
                          "rope_scaling",
                          "factor",
                          "beta_fast",
                          "beta_slow",
                          "original_max_position_embeddings",
                          "index_n_heads",
                          "index_head_dim",
                          "index_topk",
                          "n_routed_experts",
                          "num_experts_per_tok",
                          "moe_intermediate_size",
                          "routed_scaling_factor",
                          "swiglu_limit",
                          "hc_mult",
                          "hc_sinkhorn_iters"}) {
    const std::string quoted = concat("\"", key, "\"");
    const std::string text =
        replaced(to_config_json(deepseek_v4_flash()), quoted, "\"renamed_" + quoted.substr(1));
    EXPECT_NE(error_of(text).find(concat(key, ": required key is missing")), std::string::npos)
        << error_of(text);
  }
}

TEST(Config, OtherKeysHaveTheirOfficialDefault) {
  std::string text = to_config_json(deepseek_v4_flash());
  for (const char* line :
       {"  \"num_nextn_predict_layers\": 1,\n", "  \"n_shared_experts\": 1,\n",
        "  \"num_key_value_heads\": 1,\n", "  \"scoring_func\": \"sqrtsoftplus\",\n",
        "  \"hc_eps\": 1e-06,\n", "  \"rms_norm_eps\": 1e-06,\n", "  \"bos_token_id\": 0,\n"})
    text = replaced(text, line, "");
  EXPECT_EQ(parse_config(text, "c.json"), deepseek_v4_flash());
  EXPECT_EQ(parse_config(replaced(text, "\"type\": \"yarn\"", "\"rope_type\": \"yarn\""), "c.json"),
            deepseek_v4_flash());
}

TEST(Config, OtherArchitecturesAreRefusedByKey) {
  expect_error("\"deepseek_v4\"", "\"deepseek_v3\"", "model_type");
  expect_error("\"sqrtsoftplus\"", "\"sigmoid\"", "scoring_func");
  expect_error("\"noaux_tc\"", "\"greedy\"", "topk_method");
  expect_error("\"silu\"", "\"gelu\"", "hidden_act");
  expect_error("\"norm_topk_prob\": true", "\"norm_topk_prob\": false", "norm_topk_prob");
  expect_error("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", "tie_word");
  expect_error("\"attention_bias\": false", "\"attention_bias\": true", "attention_bias");
  expect_error("\"num_key_value_heads\": 1", "\"num_key_value_heads\": 8", "num_key_value_heads");
  expect_error("\"n_shared_experts\": 1", "\"n_shared_experts\": 2", "n_shared_experts");
  expect_error("\"yarn\"", "\"linear\"", "rope_scaling.type");
  expect_error("[128, 128]", "[64, 64]", "quantization_config.weight_block_size");
  expect_error("\"fp4\"", "\"int4\"", "expert_dtype");
}

TEST(Config, ContradictionsNameTheKeys) {
  expect_error("\"num_hidden_layers\": 43", "\"num_hidden_layers\": 42", "compress_ratios has 44");
  expect_error("\"o_groups\": 8", "\"o_groups\": 7", "not divisible by o_groups 7");
  expect_error("\"qk_rope_head_dim\": 64", "\"qk_rope_head_dim\": 1024", "larger than head_dim");
  expect_error("\"num_experts_per_tok\": 6", "\"num_experts_per_tok\": 257", "n_routed_experts");
  expect_error("\"index_head_dim\": 128", "\"index_head_dim\": 96", "power of two");
  expect_error("\"fp4\"", "\"bf16\"", "quantization_config");
  expect_error("\"eos_token_id\": 1", "\"eos_token_id\": 129280", "outside vocab_size");
}

TEST(Config, SizesOutOfRangeAreRefused) {
  expect_error("\"hidden_size\": 4096", "\"hidden_size\": 0", "hidden_size is 0");
  expect_error("\"hidden_size\": 4096", "\"hidden_size\": -4096", "hidden_size is -4096");
  expect_error("\"hidden_size\": 4096", "\"hidden_size\": 4096.5", "expected an integer");
  expect_error("\"hidden_size\": 4096", "\"hidden_size\": \"4096\"", "expected an integer");
  expect_error("\"hidden_size\": 4096", "\"hidden_size\": 4000000000000000000", "hidden_size is 4");
  expect_error("\"num_hidden_layers\": 43", "\"num_hidden_layers\": 4611686018427387904",
               "num_hidden_layers is 46");
  expect_error("\"factor\": 16.0", "\"factor\": 0", "rope_scaling.factor is 0");
  expect_error("\"swiglu_limit\": 10.0", "\"swiglu_limit\": -1", "swiglu_limit is -1");
  expect_error("\"num_nextn_predict_layers\": 1", "\"num_nextn_predict_layers\": 3",
               "num_nextn_predict_layers is 3");
}

}  // namespace
}  // namespace hadal::model
