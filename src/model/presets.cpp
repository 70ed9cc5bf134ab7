#include "model/presets.h"

namespace hadal::model {
namespace {

/// What both releases share.
ModelConfig common() {
  ModelConfig c;
  c.vocab_size = 129280;
  c.n_mtp_layers = 1;
  c.n_hash_layers = 3;
  c.head_dim = 512;
  c.rope_head_dim = 64;
  c.o_lora_rank = 1024;
  c.window_size = 128;
  c.rope_theta = 10000.0;
  c.compress_rope_theta = 160000.0;
  c.rope_factor = 16.0;
  c.beta_fast = 32.0;
  c.beta_slow = 1.0;
  c.original_seq_len = 65536;
  c.index_n_heads = 64;
  c.index_head_dim = 128;
  c.n_shared_experts = 1;
  c.n_activated_experts = 6;
  c.swiglu_limit = 10.0;
  c.hc_mult = 4;
  c.hc_sinkhorn_iters = 20;
  c.max_position_embeddings = 1048576;
  c.quantized = true;
  c.expert_dtype = ExpertDtype::kFp4;
  return c;
}

/// The first two layers have ratio `first`; then even layers are CSA, odd ones HCA; the MTP block
/// is window only.
std::vector<int64_t> alternate(int64_t n_layers, int64_t first) {
  std::vector<int64_t> ratios = {first, first};
  for (int64_t layer = 2; layer < n_layers; ++layer) ratios.push_back(layer % 2 == 0 ? 4 : 128);
  ratios.push_back(0);
  return ratios;
}

}  // namespace

ModelConfig deepseek_v4_flash() {
  ModelConfig c = common();
  c.dim = 4096;
  c.n_layers = 43;
  c.n_heads = 64;
  c.q_lora_rank = 1024;
  c.o_groups = 8;
  c.compress_ratios = alternate(c.n_layers, 0);
  c.index_topk = 512;
  c.n_routed_experts = 256;
  c.moe_inter_dim = 2048;
  c.route_scale = 1.5;
  return c;
}

ModelConfig deepseek_v4_pro() {
  ModelConfig c = common();
  c.dim = 7168;
  c.n_layers = 61;
  c.n_heads = 128;
  c.q_lora_rank = 1536;
  c.o_groups = 16;
  c.compress_ratios = alternate(c.n_layers, 128);
  c.index_topk = 1024;
  c.n_routed_experts = 384;
  c.moe_inter_dim = 3072;
  c.route_scale = 2.5;
  return c;
}

}  // namespace hadal::model
