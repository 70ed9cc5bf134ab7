#include "checkpoint/hf_names.h"

#include <algorithm>
#include <array>
#include <map>
#include <sstream>
#include <utility>

#include "base/check.h"

namespace hadal::checkpoint {
namespace {

using Rename = std::pair<const char*, const char*>;

/// Rest of a name behind "layers.i.", longest match first; the part behind the match is kept.
constexpr std::array kLayerRenames = {
    Rename{"attn.indexer.compressor.wkv.", "self_attn.compressor.indexer.kv_proj."},
    Rename{"attn.indexer.compressor.wgate.", "self_attn.compressor.indexer.gate_proj."},
    Rename{"attn.indexer.compressor.ape", "self_attn.compressor.indexer.position_bias"},
    Rename{"attn.indexer.compressor.norm.", "self_attn.compressor.indexer.kv_norm."},
    Rename{"attn.indexer.wq_b.", "self_attn.compressor.indexer.q_b_proj."},
    Rename{"attn.indexer.weights_proj.", "self_attn.compressor.indexer.scorer.weights_proj."},
    Rename{"attn.compressor.wkv.", "self_attn.compressor.kv_proj."},
    Rename{"attn.compressor.wgate.", "self_attn.compressor.gate_proj."},
    Rename{"attn.compressor.ape", "self_attn.compressor.position_bias"},
    Rename{"attn.compressor.norm.", "self_attn.compressor.kv_norm."},
    Rename{"attn.attn_sink", "self_attn.sinks"},
    Rename{"attn.wq_a.", "self_attn.q_a_proj."},
    Rename{"attn.wq_b.", "self_attn.q_b_proj."},
    Rename{"attn.wkv.", "self_attn.kv_proj."},
    Rename{"attn.wo_a.", "self_attn.o_a_proj."},
    Rename{"attn.wo_b.", "self_attn.o_b_proj."},
    Rename{"attn.q_norm.", "self_attn.q_a_norm."},
    Rename{"attn.kv_norm.", "self_attn.kv_norm."},
    Rename{"attn_norm.", "input_layernorm."},
    Rename{"ffn_norm.", "post_attention_layernorm."},
    Rename{"hc_attn_", "attn_hc."},
    Rename{"hc_ffn_", "ffn_hc."},
    Rename{"ffn.gate.bias", "mlp.gate.e_score_correction_bias"},
    Rename{"ffn.gate.", "mlp.gate."},
    Rename{"ffn.shared_experts.w1.", "mlp.shared_experts.gate_proj."},
    Rename{"ffn.shared_experts.w2.", "mlp.shared_experts.down_proj."},
    Rename{"ffn.shared_experts.w3.", "mlp.shared_experts.up_proj."},
};
constexpr std::array kTopRenames = {
    Rename{"embed.", "model.embed_tokens."},
    Rename{"head.", "lm_head."},
    Rename{"norm.", "model.norm."},
    Rename{"hc_head_", "model.hc_head.hc_"},
};

template <size_t n>
std::string rename(const std::string& name, const std::array<Rename, n>& table) {
  for (const auto& [from, to] : table)
    if (name.starts_with(from)) return to + name.substr(std::string(from).size());
  throw Error(concat("hf_place: no rule for ", name));
}

/// "layers.12.rest" -> {"layers.12.", "rest"}.
std::pair<std::string, std::string> split_layer(const std::string& name) {
  const size_t dot = name.find('.', std::string("layers.").size());
  return {name.substr(0, dot + 1), name.substr(dot + 1)};
}

}  // namespace

HfPlace hf_place(const TensorSpec& spec) {
  if (spec.block < 0) return {.name = rename(spec.name, kTopRenames)};
  if (!spec.name.starts_with("layers.")) return {.name = spec.name};
  const auto [layer, rest] = split_layer(spec.name);
  if (spec.role != TensorRole::kExpert)
    return {.name = "model." + layer + rename(rest, kLayerRenames)};
  const std::string number = rest.substr(std::string("ffn.experts.").size());
  const int64_t rows = spec.shape[0];
  const bool down = number.find(".w2.") != std::string::npos;
  const bool up = number.find(".w3.") != std::string::npos;
  return {.name = "model." + layer + "mlp.experts." + (down ? "down_proj" : "gate_up_proj"),
          .expert = std::stoll(number),
          .first_row = up ? rows : 0,
          .num_rows = rows};
}

std::string hf_scale_name(const std::string& hf_name) { return hf_name + "_scale_inv"; }

const char* naming_name(Naming naming) {
  constexpr const char* kNames[] = {"official names", "official names behind \"model.\"",
                                    "transformers' module names",
                                    "names as transformers' save_pretrained writes them"};
  return kNames[static_cast<int>(naming)];
}

Naming naming_of(const std::vector<std::string>& names) {
  const auto any = [&](const auto& test) { return std::any_of(names.begin(), names.end(), test); };
  // One missing or renamed tensor must not change the answer: layers tell by their many names.
  const auto layer_has = [&](const char* part) {
    return any([&](const std::string& name) {
      return name.starts_with("model.layers.") && name.find(part) != std::string::npos;
    });
  };
  if (layer_has(".self_attn.") || layer_has(".mlp.")) return Naming::kHfModules;
  if (!layer_has(".attn.") && !layer_has(".ffn.")) return Naming::kOfficial;
  const bool saved =
      layer_has(".attn.norm.") || any([](const std::string& name) {
        return name.starts_with("model.embed_tokens.") || name.starts_with("model.hc_head.");
      });
  return saved ? Naming::kHfSaved : Naming::kPrefixed;
}

std::string expected_name(const TensorSpec& spec, Naming naming) {
  if (naming == Naming::kHfModules) return hf_place(spec).name;
  const bool inside = spec.name.starts_with("layers.");
  if (naming == Naming::kOfficial || (naming == Naming::kHfSaved && !inside && spec.block >= 0))
    return spec.name;
  if (naming == Naming::kHfSaved && spec.block < 0) return hf_place(spec).name;
  return "model." + spec.name;
}

namespace {

/// Components that mean the same wherever they stand in a layer.
const std::map<std::string, std::string>& component_aliases() {
  static const std::map<std::string, std::string> kAliases = {
      {"self_attn", "attn"},
      {"mlp", "ffn"},
      {"input_layernorm", "attn_norm"},
      {"post_attention_layernorm", "ffn_norm"},
      {"sinks", "attn_sink"},
      {"q_a_proj", "wq_a"},
      {"q_b_proj", "wq_b"},
      {"kv_proj", "wkv"},
      {"o_a_proj", "wo_a"},
      {"o_b_proj", "wo_b"},
      {"q_a_norm", "q_norm"},
      {"q_a_layernorm", "q_norm"},
      {"kv_a_layernorm", "kv_norm"},
      {"position_bias", "ape"},
      {"e_score_correction_bias", "bias"},
      {"up_proj", "w3"},
      {"down_proj", "w2"},
  };
  return kAliases;
}

std::vector<std::string> split(const std::string& name) {
  std::vector<std::string> parts;
  std::istringstream stream(name);
  for (std::string part; std::getline(stream, part, '.');) parts.push_back(part);
  return parts;
}

/// The components of a layer's tensor, behind its number, under official names.
std::vector<std::string> official_parts(std::vector<std::string> parts) {
  for (std::string& part : parts)
    if (const auto alias = component_aliases().find(part); alias != component_aliases().end())
      part = alias->second;
  const auto has = [&](const char* part) {
    return std::find(parts.begin(), parts.end(), part) != parts.end();
  };
  // mHC: attn_hc.fn is hc_attn_fn.
  if (parts.size() == 2 && (parts[0] == "attn_hc" || parts[0] == "ffn_hc"))
    return {concat("hc_", parts[0] == "attn_hc" ? "attn_" : "ffn_", parts[1])};
  // gate_proj is a compressor's gate or an expert's first matrix.
  for (std::string& part : parts)
    if (part == "gate_proj") part = has("compressor") ? "wgate" : "w1";
  if (parts.size() < 2 || parts[0] != "attn") return parts;
  // The one norm of keys and values of attention is kv_norm, that of a compressor norm.
  if (parts[1] == "norm") parts[1] = "kv_norm";
  if (has("compressor"))
    for (std::string& part : parts)
      if (part == "kv_norm") part = "norm";
  std::erase(parts, "scorer");
  // transformers has the indexer inside the compressor, with a compressor's tensors of its own.
  if (parts.size() > 3 && parts[1] == "compressor" && parts[2] == "indexer") {
    const bool own = parts[3] == "wq_b" || parts[3] == "weights_proj";
    parts[1] = "indexer";
    if (own)
      parts.erase(parts.begin() + 2);
    else
      parts[2] = "compressor";
  }
  return parts;
}

}  // namespace

std::string official_name(const std::string& name) {
  const std::string bare = name.starts_with("model.") ? name.substr(6) : name;
  for (const auto& [official, hf] : kTopRenames) {
    const std::string to = hf, stem = to.starts_with("model.") ? to.substr(6) : to;
    if (bare.starts_with(stem)) return official + bare.substr(stem.size());
  }
  std::vector<std::string> parts = split(bare);
  if (parts.size() < 3 || parts[0] != "layers") return bare;
  std::vector<std::string> inside = official_parts({parts.begin() + 2, parts.end()});
  std::string result = concat(parts[0], ".", parts[1]);
  if (inside.size() == 3 && inside[0] == "ffn" && inside[1] == "experts") {
    if (inside[2] == "gate_up_proj") return result + ".ffn.experts.*.w13";
    if (inside[2] == "w2") return result + ".ffn.experts.*.w2";
  }
  for (const std::string& part : inside) result += "." + part;
  return result;
}

}  // namespace hadal::checkpoint
