#include "checkpoint/hf_names.h"

#include <algorithm>
#include <array>
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

std::string older_hf_name(const std::string& hf_name) {
  const std::string part = ".scorer.weights_proj.";
  const size_t at = hf_name.find(part);
  if (at == std::string::npos) return "";
  std::string result = hf_name;
  return result.replace(at, part.size(), ".weights_proj.");
}

std::string hf_scale_name(const std::string& hf_name) { return hf_name + "_scale_inv"; }

bool are_hf_names(const std::vector<std::string>& names) {
  return std::any_of(names.begin(), names.end(), [](const std::string& name) {
    return name == "model.embed_tokens.weight" || name.starts_with("model.layers.");
  });
}

}  // namespace hadal::checkpoint
