// FLOPs per decoded token and bytes of KV cache of a model at a context length (model.md 16).
//
// One multiply-add is two FLOPs. "Equivalent" counts weigh FP8 x1, BF16 x2, FP4 x0.5 and the FP32
// of mHC x2, in units of FP8 work. Main layers and head; the MTP block is not part of a decode step
// without drafts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"

namespace hadal::model {

/// What hardware format an amount of work runs in.
enum class Precision { kFp8, kBf16, kFp4, kFp32 };
double equivalent_weight(Precision precision);
const char* precision_name(Precision precision);

struct Work {
  std::string part;
  Precision precision;
  double flops;  ///< raw
};

struct Cost {
  std::vector<Work> work;         ///< one decoded token
  double kv_bytes_per_token = 0;  ///< growth with the context, without what follows
  double window_bytes = 0;        ///< per sequence: the sliding windows of all layers
  double state_bytes = 0;         ///< per sequence: compressor states in FP32

  double raw_flops() const;
  double equivalent_flops() const;
};

/// A V4 at context `tokens` (>= 1). KV in the production byte formats (model.md 14.5): FP8 latents
/// with BF16 rotary part, FP4 indexer keys.
Cost decode_cost(const ModelConfig& config, int64_t tokens);

/// Raw FLOPs of one token at context `tokens` through one block (n_layers: the MTP block with its
/// projections), and through the head.
double block_flops(const ModelConfig& config, int64_t block, int64_t tokens);
double head_flops(const ModelConfig& config);

/// DeepSeek-V3.2 (61 layers, MLA absorbed, FP8 indexer over all tokens), the yardstick.
Cost decode_cost_v3_2(int64_t tokens);

/// Bytes of one latent entry and of one indexer key in the production formats: 584 and 68 as
/// released.
int64_t latent_bytes(const ModelConfig& config);
int64_t index_key_bytes(const ModelConfig& config);

}  // namespace hadal::model
