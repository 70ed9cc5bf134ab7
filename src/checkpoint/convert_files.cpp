#include "checkpoint/convert_files.h"

#include <algorithm>
#include <array>
#include <filesystem>
#include <map>
#include <set>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"

namespace hadal::checkpoint {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr int64_t kMostBytes = int64_t{1} << 26;

Json load(const std::string& path) {
  const std::string text = read_file(path, kMostBytes);
  parse_json(text, path);  // its messages, and no duplicate keys
  Json json = Json::parse(text);
  HADAL_INPUT_CHECK(json.is_object(), path, ": expected a JSON object");
  return json;
}

/// The one ratio of the HCA layers: transformers has one number for all of them.
int64_t heavy_ratio(const model::ModelConfig& config) {
  int64_t heavy = 0;
  for (int64_t layer = 0; layer < config.n_layers; ++layer) {
    if (config.kind(layer) != model::LayerKind::kHca) continue;
    HADAL_INPUT_CHECK(heavy == 0 || heavy == config.ratio(layer), "compress_ratios: layers with ",
                      heavy, " and with ", config.ratio(layer),
                      ", but transformers knows one ratio besides 0 and 4");
    heavy = config.ratio(layer);
  }
  return heavy == 0 ? 128 : heavy;
}

void write_transformers_keys(Json& json, const model::ModelConfig& c) {
  for (const char* key : {"compress_ratios", "num_hash_layers", "rope_scaling"}) json.erase(key);
  std::vector<std::string> layers, experts;
  for (int64_t layer = 0; layer < c.n_layers; ++layer) {
    const model::LayerKind kind = c.kind(layer);
    layers.push_back(kind == model::LayerKind::kWindow ? "sliding_attention"
                     : kind == model::LayerKind::kCsa  ? "compressed_sparse_attention"
                                                       : "heavily_compressed_attention");
    experts.push_back(c.is_hashed(layer) ? "hash_moe" : "moe");
  }
  json["layer_types"] = layers;
  json["mlp_layer_types"] = experts;
  json["compress_rates"] = {{"compressed_sparse_attention", 4},
                            {"heavily_compressed_attention", heavy_ratio(c)}};
  const double partial = static_cast<double>(c.rope_head_dim) / static_cast<double>(c.head_dim);
  json["qk_rope_head_dim"] = c.rope_head_dim;
  json["partial_rotary_factor"] = partial;
  json["rope_theta"] = c.rope_theta;
  json["compress_rope_theta"] = c.compress_rope_theta;
  Json main, compress;
  main["rope_type"] = "default";
  main["rope_theta"] = c.rope_theta;
  main["partial_rotary_factor"] = partial;
  compress["rope_type"] = c.rope_factor == 1.0 ? "default" : "yarn";
  compress["rope_theta"] = c.compress_rope_theta;
  compress["partial_rotary_factor"] = partial;
  if (c.rope_factor != 1.0) {
    compress["factor"] = c.rope_factor;
    compress["beta_fast"] = c.beta_fast;
    compress["beta_slow"] = c.beta_slow;
    compress["original_max_position_embeddings"] = c.original_seq_len;
    compress["attention_factor"] = 1.0;
  }
  json["rope_parameters"] = {{"main", main}, {"compress", compress}};
}

void write_official_keys(Json& json, const model::ModelConfig& c) {
  for (const char* key : {"layer_types", "mlp_layer_types", "compress_rates",
                          "partial_rotary_factor", "rope_parameters", "mlp_bias",
                          "output_router_logits", "router_aux_loss_coef", "router_jitter_noise"})
    json.erase(key);
  std::vector<int64_t> ratios = c.compress_ratios;
  ratios.resize(ratios.size() + static_cast<size_t>(c.drafter.n_stages));
  json["compress_ratios"] = ratios;
  json["num_nextn_predict_layers"] = c.drafter.exists() ? 1 : c.n_mtp_layers;
  json["num_hash_layers"] = c.n_hash_layers;
  json["qk_rope_head_dim"] = c.rope_head_dim;
  json["rope_theta"] = c.rope_theta;
  json["compress_rope_theta"] = c.compress_rope_theta;
  json["rope_scaling"] = {{"type", "yarn"},
                          {"factor", c.rope_factor},
                          {"beta_fast", c.beta_fast},
                          {"beta_slow", c.beta_slow},
                          {"original_max_position_embeddings", c.original_seq_len}};
}

/// The texts of the tokenizer's added tokens by id.
std::map<int64_t, std::string> added_tokens(const std::string& path) {
  std::map<int64_t, std::string> texts;
  const Json json = load(path);
  const auto list = json.find("added_tokens");
  if (list == json.end() || !list->is_array()) return texts;
  for (const Json& token : *list) {
    if (!token.is_object() || !token.contains("id") || !token["id"].is_number_integer()) continue;
    if (token.contains("content") && token["content"].is_string())
      texts[token["id"].get<int64_t>()] = token["content"].get<std::string>();
  }
  return texts;
}

/// Rendering as chat_encoding.md 4 has it, for messages whose content is text. Reasoning of earlier
/// turns is dropped; users that follow each other are one turn.
constexpr const char* kChatTemplate =
    R"({%- set thinking = thinking | default(enable_thinking | default(false)) -%}
{%- set ns = namespace(last_user=-1, open=false) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- set last = loop.last -%}
{%- set next = '' if last else messages[loop.index0 + 1]['role'] -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] or '' -}}
{%- elif message['role'] == 'user' -%}
{{- '\n\n' if ns.open else '<｜User｜>' -}}{{- message['content'] -}}
{%- set ns.open = next == 'user' -%}
{%- if next == 'assistant' or (last and add_generation_prompt) -%}
{{- '<｜Assistant｜>' -}}
{{- '<think>' if thinking and loop.index0 >= ns.last_user else '</think>' -}}
{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{%- if thinking and loop.index0 > ns.last_user -%}
{{- message.get('reasoning_content') or '' -}}{{- '</think>' -}}
{%- endif -%}
{{- message['content'] or '' -}}{{- eos_token -}}
{%- else -%}
{{- raise_exception('this template renders system, user and assistant messages; '
    'for tools use the official encoder (hadal chat-encode)') -}}
{%- endif -%}
{%- endfor -%}
)";

void write_json(const std::string& path, const Json& json) {
  write_file_atomic(path, json.dump(2) + "\n");
}

}  // namespace

std::string converted_config(const std::string& path,
                             const model::ModelConfig& config,
                             const ConfigTarget& target) {
  Json json = load(path);
  if (target.transformers)
    write_transformers_keys(json, config);
  else
    write_official_keys(json, config);
  // The head must be there as a tensor of its own; the class is what transformers loads.
  if (target.transformers) json["architectures"] = {"DeepseekV4ForCausalLM"};
  for (const char* key : {"dtype", "torch_dtype"})
    if (json.contains(key)) json[key] = target.f32 ? "float32" : "bfloat16";
  if (target.storage == Storage::kBf16) {
    json.erase("quantization_config");
    json.erase("expert_dtype");
    return json.dump(2) + "\n";
  }
  json["expert_dtype"] = target.storage == Storage::kFp4 ? "fp4" : "fp8";
  if (!json.contains("quantization_config")) {
    Json& quantisation = json["quantization_config"];
    quantisation["activation_scheme"] = "dynamic";
    quantisation["fmt"] = "e4m3";
    quantisation["quant_method"] = "fp8";
    if (target.storage != Storage::kFp8F32Scales) quantisation["scale_fmt"] = "ue8m0";
    quantisation["weight_block_size"] = {128, 128};
  }
  return json.dump(2) + "\n";
}

void write_transformers_files(const std::string& folder, const model::ModelConfig& config) {
  const auto there = [&](const char* name) { return fs::exists(folder + "/" + name); };
  const std::string generation_path = folder + "/generation_config.json";
  Json generation = there("generation_config.json") ? load(generation_path) : Json::object();
  const std::pair<const char*, Json> fields[] = {{"bos_token_id", config.bos_token_id},
                                                 {"eos_token_id", config.eos_token_id},
                                                 {"pad_token_id", config.eos_token_id},
                                                 {"do_sample", true},
                                                 {"temperature", 1.0},
                                                 {"top_p", 1.0}};
  for (const auto& [key, value] : fields)
    if (!generation.contains(key)) generation[key] = value;
  write_json(generation_path, generation);
  if (!there("tokenizer.json")) return;
  const std::map<int64_t, std::string> texts = added_tokens(folder + "/tokenizer.json");
  const auto bos = texts.find(config.bos_token_id), eos = texts.find(config.eos_token_id);
  const std::string settings_path = folder + "/tokenizer_config.json";
  Json settings = there("tokenizer_config.json") ? load(settings_path) : Json::object();
  const auto set = [&](const char* key, const Json& value) {
    if (!settings.contains(key) || settings[key].is_null()) settings[key] = value;
  };
  set("tokenizer_class", "PreTrainedTokenizerFast");
  if (bos != texts.end()) set("bos_token", bos->second);
  if (eos != texts.end()) {
    set("eos_token", eos->second);
    set("pad_token", eos->second);  // as the release has it
  }
  set("clean_up_tokenization_spaces", false);
  set("model_max_length", config.max_position_embeddings);
  write_json(settings_path, settings);
  std::set<std::string> known;
  for (const auto& [id, text] : texts) known.insert(text);
  constexpr std::array kMarks = {"<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"};
  const bool speaks =
      bos != texts.end() && eos != texts.end() &&
      std::all_of(kMarks.begin(), kMarks.end(), [&](auto mark) { return known.contains(mark); });
  if (speaks && !there("chat_template.jinja") && !settings.contains("chat_template"))
    write_file_atomic(folder + "/chat_template.jinja", kChatTemplate);
}

}  // namespace hadal::checkpoint
