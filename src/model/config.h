// ModelConfig: the hyper-parameters of a DeepSeek-V4 model, under the names of the official
// inference config (ModelArgs); config.json's Hugging Face spelling is mapped on reading
// (docs/notation.md has the table).
//
// Architectures are facts: the released ones are functions in model/presets.h, anything else is
// read from a checkpoint's config.json. Values that follow from others are functions, not fields.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace hadal::model {

/// What a layer's compression ratio makes of it (model.md 7): 0 window only, 4 CSA,
/// anything else HCA.
enum class LayerKind { kWindow, kCsa, kHca };

/// Storage of the routed experts' matrices.
enum class ExpertDtype { kFp4, kFp8, kBf16 };

/// The DSpark drafter of V4-0731 (stages `mtp.0` ... of the checkpoint, in place of the MTP block;
/// model/drafter.h).
struct DsparkConfig {
  int64_t n_stages = 0;    ///< 0 beside a block size: not said by the config
  int64_t block_size = 0;  ///< tokens drafted a round; 0: no drafter
  int64_t noise_token_id = 0;
  int64_t markov_rank = 0;
  std::vector<int64_t> target_layers;  ///< main layers whose output it reads

  bool exists() const { return block_size > 0; }
  bool operator==(const DsparkConfig&) const = default;
};

struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t dim = 0;
  int64_t n_layers = 0;      ///< main layers, MTP not counted
  int64_t n_mtp_layers = 1;  ///< 0 or 1
  int64_t n_hash_layers = 0;
  int64_t n_heads = 0;
  int64_t head_dim = 0;
  int64_t rope_head_dim = 0;
  int64_t q_lora_rank = 0;
  int64_t o_groups = 0;
  int64_t o_lora_rank = 0;
  int64_t window_size = 0;
  std::vector<int64_t>
      compress_ratios;          ///< [n_layers + n_mtp_layers]; the last belongs to the MTP block
  double rope_theta = 10000.0;  ///< layers with ratio 0
  double compress_rope_theta = 0.0;  ///< layers with ratio > 0
  double rope_factor = 16.0;         ///< YaRN, layers with ratio > 0 only
  double beta_fast = 32.0;
  double beta_slow = 1.0;
  int64_t original_seq_len = 0;
  int64_t index_n_heads = 0;
  int64_t index_head_dim = 0;
  int64_t index_topk = 0;
  int64_t n_routed_experts = 0;
  int64_t n_shared_experts = 1;
  int64_t n_activated_experts = 0;
  int64_t moe_inter_dim = 0;
  double route_scale = 1.0;
  double swiglu_limit = 10.0;
  int64_t hc_mult = 4;
  int64_t hc_sinkhorn_iters = 20;
  double hc_eps = 1e-6;
  double norm_eps = 1e-6;
  int64_t max_position_embeddings = 0;
  int64_t trained_length = 0;  ///< tokens of the longest training rows; 0: not said
  int64_t bos_token_id = 0;
  int64_t eos_token_id = 1;
  /// False for a checkpoint without quantization_config: every matrix is stored in BF16 (or F32)
  /// without scales.
  bool quantized = false;
  ExpertDtype expert_dtype = ExpertDtype::kBf16;
  DsparkConfig drafter;  ///< beside it n_mtp_layers is 0

  /// Layers and MTP blocks together; index n_layers is the MTP block.
  int64_t n_blocks() const { return n_layers + n_mtp_layers; }
  /// Blocks that have a cache when drafts are made: the layers, then the MTP block or the drafter's
  /// stages.
  int64_t n_drafting_blocks() const { return n_blocks() + drafter.n_stages; }
  int64_t ratio(int64_t block) const {
    const bool is_stage = block >= n_blocks() && block < n_drafting_blocks();
    return is_stage ? 0 : compress_ratios.at(static_cast<size_t>(block));
  }
  static LayerKind kind_of(int64_t ratio) {
    return ratio == 0 ? LayerKind::kWindow : ratio == 4 ? LayerKind::kCsa : LayerKind::kHca;
  }
  LayerKind kind(int64_t block) const { return kind_of(ratio(block)); }
  /// Blocks that a pooled entry draws from: CSA overlaps with the previous block.
  static int64_t overlap(int64_t ratio) { return ratio == 4 ? 2 : 1; }
  bool is_hashed(int64_t block) const { return block < n_hash_layers; }
  int64_t nope_head_dim() const { return head_dim - rope_head_dim; }
  int64_t heads_per_group() const { return n_heads / o_groups; }
  /// Rows of hc_attn_fn and hc_ffn_fn: n collapse, n expand and n x n combination weights.
  int64_t hc_rows() const { return (2 + hc_mult) * hc_mult; }

  bool operator==(const ModelConfig&) const = default;

  /// Throws InputError naming the keys when values are outside sane ranges or contradict each
  /// other.
  void validate() const;
  /// Throws InputError unless the `released` numerics can run this shape: head_dim - rope_head_dim
  /// divisible by 64, index_head_dim by 32, and the input size of every quantised matrix by 128
  /// (model.md 7).
  void check_released() const;
  /// The last of these alone, which is what `fp8` asks for; `numerics` is named in the error.
  void check_fp8(const char* numerics = "fp8") const;
  /// The one of the two that a model with these experts is served in.
  void check_stored() const;
};

/// Reads a config.json, official or as transformers writes it (config_forms.h). Missing required
/// keys, contradictions and unimplemented variants are InputErrors that name the keys; unknown keys
/// are listed once as a warning. `origin` names the source in messages.
ModelConfig parse_config(const std::string& json_text, const std::string& origin);
/// The same for a file or for the config.json of a directory.
ModelConfig load_config(const std::string& path);
/// An official config.json with the same content: parse_config(to_config_json(c)) == c.
std::string to_config_json(const ModelConfig& config);

}  // namespace hadal::model
