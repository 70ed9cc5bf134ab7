#include "testing/tiny_model.h"

#include <cmath>

#include <ATen/ATen.h>

#include "model/init.h"

namespace hadal::testing {

model::ModelConfig tiny_config() {
  model::ModelConfig config;
  config.vocab_size = 256;
  config.dim = 64;
  config.n_layers = 5;
  config.n_mtp_layers = 1;
  config.n_hash_layers = 1;
  config.n_heads = 4;
  config.head_dim = 32;
  config.rope_head_dim = 16;
  config.q_lora_rank = 48;
  config.o_groups = 2;
  config.o_lora_rank = 32;
  config.window_size = 16;
  config.compress_ratios = {0, 4, 16, 4, 16, 0};
  config.compress_rope_theta = 160000.0;
  config.original_seq_len = 256;
  config.index_n_heads = 4;
  config.index_head_dim = 32;
  config.index_topk = 8;
  config.n_routed_experts = 8;
  config.n_activated_experts = 2;
  config.moe_inter_dim = 32;
  config.route_scale = 1.5;
  config.swiglu_limit = 2.0;
  config.max_position_embeddings = 4096;
  return config;
}

model::ModelConfig small_config() {
  model::ModelConfig config = tiny_config();
  config.dim = 256;
  config.head_dim = 128;
  config.rope_head_dim = 64;
  config.q_lora_rank = 128;
  config.o_lora_rank = 128;
  config.window_size = 128;
  config.compress_ratios = {0, 4, 128, 4, 128, 0};
  config.index_head_dim = 128;
  config.index_topk = 32;
  config.moe_inter_dim = 128;
  return config;
}

model::ModelConfig mini_config() {
  model::ModelConfig config = tiny_config();
  config.vocab_size = 128;
  config.dim = 128;
  config.n_layers = 4;
  config.hc_mult = 2;
  config.n_heads = 2;
  config.head_dim = 128;
  config.rope_head_dim = 64;
  config.q_lora_rank = 128;
  config.o_lora_rank = 64;
  config.window_size = 12;
  config.compress_ratios = {0, 4, 16, 4, 0};
  config.index_n_heads = 2;
  config.index_head_dim = 64;
  config.index_topk = 4;
  config.n_routed_experts = 4;
  config.moe_inter_dim = 128;
  return config;
}

model::ModelConfig with_drafter(model::ModelConfig config) {
  config.compress_ratios.resize(static_cast<size_t>(config.n_layers));
  config.n_mtp_layers = 0;
  config.drafter = {.n_stages = 2,
                    .block_size = 4,
                    .noise_token_id = 5,
                    .markov_rank = 16,
                    .target_layers = {config.n_layers - 1, 0, 2}};
  return config;
}

model::ModelConfig nano_config() {
  model::ModelConfig config = small_config();
  config.vocab_size = 8192;
  config.dim = 384;
  config.n_layers = 8;
  config.n_hash_layers = 2;
  config.compress_ratios = {0, 0, 4, 128, 4, 128, 4, 128, 0};
  config.n_heads = 6;
  config.q_lora_rank = 256;
  config.o_groups = 3;
  config.o_lora_rank = 128;
  config.original_seq_len = 65536;
  config.index_n_heads = 8;
  config.index_topk = 128;
  config.n_routed_experts = 12;
  config.n_activated_experts = 3;
  config.moe_inter_dim = 256;
  config.swiglu_limit = 10.0;
  config.max_position_embeddings = 1048576;
  return config;
}

model::Transformer random_model(const model::ModelConfig& config,
                                uint64_t seed,
                                at::ScalarType dtype) {
  model::Transformer model(config);
  model::init_weights(model, {.seed = seed, .std = 1.0, .token_counts = {}}, dtype);
  at::manual_seed(seed);
  const auto jitter = [&](model::Parameter& parameter, double scale) {
    parameter.value = parameter.value + at::randn(parameter.shape, at::kDouble).to(dtype) * scale;
  };
  model.visit([&](model::Parameter& parameter) {
    using model::ParamKind;
    switch (parameter.kind) {
      case ParamKind::kMatrix:
      case ParamKind::kGroups:
      case ParamKind::kExperts:
      case ParamKind::kHcFn:
        parameter.value = parameter.value / std::sqrt(static_cast<double>(parameter.shape.back()));
        break;
      case ParamKind::kHead:
        parameter.value = parameter.value * (2.0 / std::sqrt(static_cast<double>(config.dim)));
        break;
      case ParamKind::kHcScale:
        parameter.value = at::full(parameter.shape, 0.5, dtype);
        break;
      case ParamKind::kNorm:
      case ParamKind::kGateBias:
        jitter(parameter, 0.1);
        break;
      case ParamKind::kSink:
      case ParamKind::kApe:
      case ParamKind::kHcBase:
        jitter(parameter, 0.5);
        break;
      case ParamKind::kEmbedding:
      case ParamKind::kHashTable:
        break;
    }
  });
  return model;
}

}  // namespace hadal::testing
