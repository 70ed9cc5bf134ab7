#include "model/config.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"
#include "base/join.h"
#include "base/json.h"
#include "base/log.h"
#include "model/config_forms.h"

namespace hadal::model {
namespace {

// Bounds far above any real model; products of any three of them with a vocabulary stay inside
// int64.
constexpr int64_t kMaxSize = int64_t{1} << 20;
constexpr int64_t kMaxWidth = int64_t{1} << 17;    // hidden size, expert width, ranks
constexpr int64_t kMaxExperts = int64_t{1} << 14;  // of a layer
// Tables of tensors stay small and sums of bytes inside int64: 15 times V4-Pro's, and 90 times.
constexpr int64_t kMaxExpertTensors = int64_t{1} << 20;
constexpr double kMaxParameters = 0x1p47;
constexpr int64_t kMaxVocab = (int64_t{1} << 31) - 1;  // token ids are int32 on the device
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxStreams = 64;
constexpr int64_t kMaxPositions = (int64_t{1} << 31) - 1;
constexpr int64_t kQuantBlock = 128;  // edge of an FP8 weight block (model.md 14.4)

/// Keys of config.json that say nothing about the arithmetic.
constexpr const char* kIgnoredKeys[] = {"architectures",
                                        "attention_dropout",
                                        "auto_map",
                                        "dtype",
                                        "initializer_range",
                                        "torch_dtype",
                                        "transformers_version",
                                        "use_cache",
                                        "pad_token_id",
                                        "_name_or_path",
                                        "output_router_logits",
                                        "router_aux_loss_coef",
                                        "router_jitter_noise"};

struct Variant {
  const char* prefix;
  const char* name;
};
/// Beginnings of keys that belong to models this program does not implement.
constexpr Variant kVariants[] = {{"engram", "Engram (V4.1)"}, {"ngram", "Engram (V4.1)"}};

void refuse_variants(const JsonObject& root, const std::string& origin) {
  for (const Variant& variant : kVariants) {
    std::vector<std::string> found;
    for (const std::string& key : root.keys())
      if (key.starts_with(variant.prefix)) found.push_back(key);
    HADAL_INPUT_CHECK(found.empty(), origin, ": the variant ", variant.name,
                      " is not implemented (", join(found), ")");
  }
}

void expect_string(const JsonObject& object, const std::string& key, const std::string& value) {
  const std::string found = object.string_or(key, value);
  HADAL_INPUT_CHECK(found == value, object.where(key), ": only ", json_quote(value),
                    " is implemented, found ", json_quote(found));
}

void expect_boolean(const JsonObject& object, const std::string& key, bool value) {
  HADAL_INPUT_CHECK(object.boolean_or(key, value) == value, object.where(key), ": only ",
                    value ? "true" : "false", " is implemented");
}

void expect_one(const JsonObject& object, const std::string& key) {
  const int64_t found = object.integer_or(key, 1, 0, kMaxSize);
  HADAL_INPUT_CHECK(found == 1, object.where(key), ": only 1 is implemented, found ", found);
}

/// What every V4 has and no field holds: a value other than the released one is another
/// architecture.
void expect_fixed_choices(const JsonObject& root) {
  expect_string(root, "model_type", "deepseek_v4");
  expect_string(root, "scoring_func", "sqrtsoftplus");
  expect_string(root, "topk_method", "noaux_tc");
  expect_string(root, "hidden_act", "silu");
  expect_boolean(root, "norm_topk_prob", true);
  expect_boolean(root, "tie_word_embeddings", false);
  expect_boolean(root, "attention_bias", false);
  expect_boolean(root, "mlp_bias", false);
  expect_one(root, "num_key_value_heads");
  expect_one(root, "n_shared_experts");
}

void read_quantization(const JsonObject& root, ModelConfig& config) {
  config.quantized = root.has("quantization_config");
  const std::string expert = root.string_or("expert_dtype", config.quantized ? "fp8" : "bf16");
  if (expert == "fp4") {
    config.expert_dtype = ExpertDtype::kFp4;
  } else if (expert == "fp8") {
    config.expert_dtype = ExpertDtype::kFp8;
  } else {
    HADAL_INPUT_CHECK(expert == "bf16", root.where("expert_dtype"),
                      ": expected \"fp4\", \"fp8\" or \"bf16\", found ", json_quote(expert));
    config.expert_dtype = ExpertDtype::kBf16;
  }
  if (!config.quantized) return;
  const JsonObject quant = root.object("quantization_config");
  expect_string(quant, "quant_method", "fp8");
  expect_string(quant, "fmt", "e4m3");
  expect_string(quant, "activation_scheme", "dynamic");
  expect_string(quant, "scale_fmt", "ue8m0");
  if (quant.has("weight_block_size")) {
    const auto block = quant.integers("weight_block_size", 1, kMaxSize);
    HADAL_INPUT_CHECK(block == std::vector<int64_t>({kQuantBlock, kQuantBlock}),
                      quant.where("weight_block_size"), ": only [128, 128] is implemented, found ",
                      "[", join(block), "]");
  }
}

void check_size(const char* key, int64_t value, int64_t min, int64_t max) {
  HADAL_INPUT_CHECK(value >= min && value <= max, key, " is ", value, ", expected ", min, " to ",
                    max);
}

void check_number(const char* key, double value, double min, double max) {
  HADAL_INPUT_CHECK(value >= min && value <= max, key, " is ", value, ", expected ", min, " to ",
                    max);
}

void check_sizes(const ModelConfig& c) {
  check_size("vocab_size", c.vocab_size, 1, kMaxVocab);
  check_size("hidden_size", c.dim, 1, kMaxWidth);
  check_size("num_hidden_layers", c.n_layers, 1, kMaxLayers);
  check_size("num_nextn_predict_layers", c.n_mtp_layers, 0, 1);
  // More hash layers than blocks means all of them (the golden files use this).
  check_size("num_hash_layers", c.n_hash_layers, 0, kMaxLayers);
  check_size("num_attention_heads", c.n_heads, 1, kMaxWidth);
  check_size("head_dim", c.head_dim, 1, kMaxWidth);
  check_size("qk_rope_head_dim", c.rope_head_dim, 2, kMaxSize);
  check_size("q_lora_rank", c.q_lora_rank, 1, kMaxWidth);
  check_size("o_groups", c.o_groups, 1, kMaxSize);
  check_size("o_lora_rank", c.o_lora_rank, 1, kMaxWidth);
  check_size("sliding_window", c.window_size, 1, kMaxPositions);
  check_size("index_n_heads", c.index_n_heads, 1, kMaxWidth);
  check_size("index_head_dim", c.index_head_dim, 1, kMaxWidth);
  check_size("index_topk", c.index_topk, 1, kMaxPositions);
  check_size("n_routed_experts", c.n_routed_experts, 1, kMaxExperts);
  check_size("n_shared_experts", c.n_shared_experts, 1, 1);
  check_size("num_experts_per_tok", c.n_activated_experts, 1, kMaxSize);
  check_size("moe_intermediate_size", c.moe_inter_dim, 1, kMaxWidth);
  check_size("hc_mult", c.hc_mult, 1, kMaxStreams);
  check_size("hc_sinkhorn_iters", c.hc_sinkhorn_iters, 1, 10000);
  check_size("max_position_embeddings", c.max_position_embeddings, 1, kMaxPositions);
  check_size("trained_length", c.trained_length, 0, c.max_position_embeddings);
  check_size("rope_scaling.original_max_position_embeddings", c.original_seq_len, 1, kMaxPositions);
  for (const int64_t ratio : c.compress_ratios) check_size("compress_ratios", ratio, 0, kMaxSize);
  check_number("rope_theta", c.rope_theta, 1.0 + 1e-6, 1e12);
  check_number("compress_rope_theta", c.compress_rope_theta, 1.0 + 1e-6, 1e12);
  check_number("rope_scaling.factor", c.rope_factor, 1.0, 1e6);
  check_number("rope_scaling.beta_slow", c.beta_slow, 1e-3, 1e6);
  check_number("rope_scaling.beta_fast", c.beta_fast, 1e-3, 1e6);
  check_number("routed_scaling_factor", c.route_scale, 1e-6, 1e6);
  check_number("swiglu_limit", c.swiglu_limit, 1e-3, 1e6);
  check_number("hc_eps", c.hc_eps, 0.0, 0.1);
  check_number("rms_norm_eps", c.norm_eps, 0.0, 0.1);
}

/// Before anything is counted or allocated: sizes that are each possible but not together.
void check_total(const ModelConfig& c) {
  const int64_t blocks = c.n_blocks() + c.drafter.n_stages;
  HADAL_INPUT_CHECK(blocks * c.n_routed_experts * 3 <= kMaxExpertTensors, "n_routed_experts is ",
                    c.n_routed_experts, " in each of ", blocks, " blocks, expected at most ",
                    kMaxExpertTensors / 3, " experts altogether");
  const auto dim = static_cast<double>(c.dim);
  const auto attention =
      static_cast<double>(c.n_heads) * static_cast<double>(c.head_dim) *
          static_cast<double>(c.q_lora_rank + c.o_lora_rank) +
      dim * static_cast<double>(c.q_lora_rank + c.head_dim + c.o_groups * c.o_lora_rank);
  const double experts = 3.0 * dim * static_cast<double>(c.moe_inter_dim) *
                         static_cast<double>(c.n_routed_experts + 1);
  const double total = 2.0 * dim * static_cast<double>(c.vocab_size) +
                       static_cast<double>(blocks) * (attention + experts);
  HADAL_INPUT_CHECK(total <= kMaxParameters, "hidden_size ", c.dim, ", moe_intermediate_size ",
                    c.moe_inter_dim, ", n_routed_experts ", c.n_routed_experts, " and ", blocks,
                    " blocks make about ", total, " parameters, expected at most ", kMaxParameters);
}

void check_drafter(const ModelConfig& c) {
  if (!c.drafter.exists()) return;
  check_size("dspark_block_size", c.drafter.block_size, 1, 1024);
  check_size("dspark_noise_token_id", c.drafter.noise_token_id, 0, c.vocab_size - 1);
  check_size("dspark_markov_rank", c.drafter.markov_rank, 1, kMaxWidth);
  check_size("stages of the drafter (compress_ratios)", c.drafter.n_stages, 0, 64);
  HADAL_INPUT_CHECK(!c.drafter.target_layers.empty(),
                    "dspark_target_layer_ids: expected at least one layer");
  for (const int64_t layer : c.drafter.target_layers) {
    check_size("dspark_target_layer_ids", layer, 0, c.n_layers - 1);
    HADAL_INPUT_CHECK(
        std::count(c.drafter.target_layers.begin(), c.drafter.target_layers.end(), layer) == 1,
        "dspark_target_layer_ids: layer ", layer, " twice");
  }
}

}  // namespace

void ModelConfig::validate() const {
  check_sizes(*this);
  check_drafter(*this);
  check_total(*this);
  HADAL_INPUT_CHECK(static_cast<int64_t>(compress_ratios.size()) == n_blocks(),
                    "compress_ratios has ", compress_ratios.size(),
                    " entries, num_hidden_layers + num_nextn_predict_layers is ", n_layers, " + ",
                    n_mtp_layers);
  HADAL_INPUT_CHECK(rope_head_dim % 2 == 0, "qk_rope_head_dim is ", rope_head_dim,
                    ", expected an even number");
  HADAL_INPUT_CHECK(rope_head_dim <= head_dim, "qk_rope_head_dim is ", rope_head_dim,
                    ", larger than head_dim ", head_dim);
  const bool has_csa =
      std::find(compress_ratios.begin(), compress_ratios.end(), 4) != compress_ratios.end();
  HADAL_INPUT_CHECK(!has_csa || rope_head_dim <= index_head_dim, "qk_rope_head_dim is ",
                    rope_head_dim, ", larger than index_head_dim ", index_head_dim);
  HADAL_INPUT_CHECK(std::has_single_bit(static_cast<uint64_t>(index_head_dim)),
                    "index_head_dim is ", index_head_dim,
                    ", expected a power of two (Hadamard rotation)");
  HADAL_INPUT_CHECK(n_heads % o_groups == 0, "num_attention_heads ", n_heads,
                    " is not divisible by o_groups ", o_groups);
  HADAL_INPUT_CHECK(n_activated_experts <= n_routed_experts, "num_experts_per_tok is ",
                    n_activated_experts, ", more than n_routed_experts ", n_routed_experts);
  HADAL_INPUT_CHECK(beta_fast >= beta_slow, "rope_scaling.beta_fast ", beta_fast,
                    " is below rope_scaling.beta_slow ", beta_slow);
  HADAL_INPUT_CHECK(quantized || expert_dtype == ExpertDtype::kBf16,
                    "expert_dtype names a quantised type but there is no quantization_config");
  HADAL_INPUT_CHECK(!quantized || expert_dtype != ExpertDtype::kBf16,
                    "expert_dtype is \"bf16\" but there is a quantization_config");
  for (const auto& [key, id] :
       {std::pair{"bos_token_id", bos_token_id}, std::pair{"eos_token_id", eos_token_id}})
    HADAL_INPUT_CHECK(id >= 0 && id < vocab_size, key, " is ", id, ", outside vocab_size ",
                      vocab_size);
}

void ModelConfig::check_fp8(const char* numerics) const {
  const std::pair<const char*, int64_t> inputs[] = {
      {"hidden_size", dim},
      {"q_lora_rank", q_lora_rank},
      {"num_attention_heads / o_groups * head_dim", heads_per_group() * head_dim},
      {"o_groups * o_lora_rank", o_groups * o_lora_rank},
      {"moe_intermediate_size", moe_inter_dim}};
  for (const auto& [key, size] : inputs)
    HADAL_INPUT_CHECK(size % kQuantBlock == 0, numerics, " numerics need ", key, " divisible by ",
                      kQuantBlock, ", found ", size);
}

void ModelConfig::check_released() const {
  HADAL_INPUT_CHECK(nope_head_dim() % 64 == 0,
                    "released numerics need head_dim - qk_rope_head_dim ",
                    "divisible by 64, found ", head_dim, " - ", rope_head_dim);
  HADAL_INPUT_CHECK(index_head_dim % 32 == 0,
                    "released numerics need index_head_dim divisible by 32, found ",
                    index_head_dim);
  check_fp8("released");
}

void ModelConfig::check_stored() const {
  if (expert_dtype == ExpertDtype::kFp8) return check_fp8();
  check_released();
}

ModelConfig parse_config(const std::string& json_text, const std::string& origin) {
  const JsonObject root = JsonObject::parse(json_text, origin);
  refuse_variants(root, origin);
  expect_fixed_choices(root);
  constexpr int64_t kAny = int64_t{1} << 62;  // ranges are validate()'s business
  const auto integer = [&](const char* key) { return root.integer(key, -kAny, kAny); };
  const auto integer_or = [&](const char* key, int64_t value) {
    return root.integer_or(key, value, -kAny, kAny);
  };
  ModelConfig c;
  c.vocab_size = integer("vocab_size");
  c.dim = integer("hidden_size");
  c.n_layers = integer("num_hidden_layers");
  c.n_mtp_layers = integer_or("num_nextn_predict_layers", 1);
  c.n_heads = integer("num_attention_heads");
  c.head_dim = integer("head_dim");
  c.q_lora_rank = integer("q_lora_rank");
  c.o_groups = integer("o_groups");
  c.o_lora_rank = integer("o_lora_rank");
  c.window_size = integer("sliding_window");
  c.max_position_embeddings = integer_or("max_position_embeddings", 1048576);
  read_layer_kinds(root, c);
  read_rope(root, c);
  read_drafter(root, c);
  c.index_n_heads = integer("index_n_heads");
  c.index_head_dim = integer("index_head_dim");
  c.index_topk = integer("index_topk");
  c.n_routed_experts = integer("n_routed_experts");
  c.n_activated_experts = integer("num_experts_per_tok");
  c.moe_inter_dim = integer("moe_intermediate_size");
  c.route_scale = root.number("routed_scaling_factor");
  c.swiglu_limit = root.number("swiglu_limit");
  c.hc_mult = integer("hc_mult");
  c.hc_sinkhorn_iters = integer("hc_sinkhorn_iters");
  c.hc_eps = root.number_or("hc_eps", 1e-6);
  c.norm_eps = root.number_or("rms_norm_eps", 1e-6);
  c.trained_length = integer_or("trained_length", 0);
  c.bos_token_id = integer_or("bos_token_id", 0);
  c.eos_token_id = integer_or("eos_token_id", 1);
  read_quantization(root, c);
  for (const char* key : kIgnoredKeys) root.has(key);
  try {
    c.validate();
  } catch (const InputError& error) {
    throw InputError(concat(origin, ": ", error.what()));
  }
  const auto unread = root.unread_keys();
  if (!unread.empty()) log::warn("config", origin, ": ignoring unknown keys: ", join(unread));
  return c;
}

ModelConfig load_config(const std::string& path) {
  std::error_code ignored;
  const std::string file =
      std::filesystem::is_directory(path, ignored) ? path + "/config.json" : path;
  return parse_config(read_file(file, int64_t{1} << 24), file);
}

std::string to_config_json(const ModelConfig& c) {
  // The stages of a drafter are window layers; the release says one MTP layer beside them.
  std::vector<int64_t> ratios = c.compress_ratios;
  ratios.resize(ratios.size() + static_cast<size_t>(c.drafter.n_stages));
  JsonWriter out;
  out.begin_object();
  out.key("architectures").begin_array().value("DeepseekV4ForCausalLM").end_array();
  out.field("model_type", "deepseek_v4").field("torch_dtype", "bfloat16");
  out.field("vocab_size", c.vocab_size)
      .field("hidden_size", c.dim)
      .field("num_hidden_layers", c.n_layers)
      .field("num_nextn_predict_layers", c.drafter.exists() ? 1 : c.n_mtp_layers)
      .field("num_hash_layers", c.n_hash_layers)
      .field("num_attention_heads", c.n_heads)
      .field("num_key_value_heads", 1)
      .field("head_dim", c.head_dim)
      .field("qk_rope_head_dim", c.rope_head_dim)
      .field("q_lora_rank", c.q_lora_rank)
      .field("o_groups", c.o_groups)
      .field("o_lora_rank", c.o_lora_rank)
      .field("sliding_window", c.window_size)
      .field("compress_ratios", ratios)
      .field("compress_rope_theta", c.compress_rope_theta)
      .field("rope_theta", c.rope_theta);
  out.key("rope_scaling")
      .begin_object()
      .field("type", "yarn")
      .field("factor", c.rope_factor)
      .field("beta_fast", c.beta_fast)
      .field("beta_slow", c.beta_slow)
      .field("original_max_position_embeddings", c.original_seq_len)
      .end_object();
  out.field("index_n_heads", c.index_n_heads)
      .field("index_head_dim", c.index_head_dim)
      .field("index_topk", c.index_topk)
      .field("n_routed_experts", c.n_routed_experts)
      .field("n_shared_experts", c.n_shared_experts)
      .field("num_experts_per_tok", c.n_activated_experts)
      .field("moe_intermediate_size", c.moe_inter_dim)
      .field("scoring_func", "sqrtsoftplus")
      .field("topk_method", "noaux_tc")
      .field("norm_topk_prob", true)
      .field("routed_scaling_factor", c.route_scale)
      .field("swiglu_limit", c.swiglu_limit)
      .field("hidden_act", "silu")
      .field("hc_mult", c.hc_mult)
      .field("hc_sinkhorn_iters", c.hc_sinkhorn_iters)
      .field("hc_eps", c.hc_eps)
      .field("rms_norm_eps", c.norm_eps)
      .field("max_position_embeddings", c.max_position_embeddings)
      .field("tie_word_embeddings", false)
      .field("attention_bias", false)
      .field("attention_dropout", 0.0)
      .field("bos_token_id", c.bos_token_id)
      .field("eos_token_id", c.eos_token_id);
  if (c.trained_length > 0) out.field("trained_length", c.trained_length);
  if (c.drafter.exists())
    out.field("dspark_block_size", c.drafter.block_size)
        .field("dspark_noise_token_id", c.drafter.noise_token_id)
        .field("dspark_target_layer_ids", c.drafter.target_layers)
        .field("dspark_markov_rank", c.drafter.markov_rank);
  if (c.quantized) {
    out.field("expert_dtype", c.expert_dtype == ExpertDtype::kFp4 ? "fp4" : "fp8");
    out.key("quantization_config")
        .begin_object()
        .field("activation_scheme", "dynamic")
        .field("fmt", "e4m3")
        .field("quant_method", "fp8");
    // Beside FP8 experts scales are F32, as in Base checkpoints.
    if (c.expert_dtype == ExpertDtype::kFp4) out.field("scale_fmt", "ue8m0");
    out.field("weight_block_size", std::vector<int64_t>{kQuantBlock, kQuantBlock}).end_object();
  }
  return out.end_object().str();
}

}  // namespace hadal::model
