// Attention of one block: low-rank queries, one latent for keys and values, window, compressed
// blocks, indexer, grouped output projection (model.md 6 to 10).
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "model/config.h"
#include "model/context.h"
#include "model/parameter.h"
#include "ops/attention/rope.h"

namespace hadal::model {

/// Pools ratio tokens into one entry of width `d`; the indexer has a second, smaller one.
struct Compressor {
  Parameter wkv, wgate, ape, norm;
};

struct Indexer {
  Parameter wq_b, weights_proj;
  Compressor compressor;
};

struct Attention {
  Parameter attn_sink, wq_a, q_norm, wq_b, wkv, kv_norm, wo_a, wo_b;
  std::optional<Compressor> compressor;  ///< ratio > 0
  std::optional<Indexer> indexer;        ///< CSA
};

struct AttentionOutput {
  at::Tensor out;  ///< [tokens, dim]
  AttentionAux aux;
};

/// x [tokens, dim], after attn_norm -> [tokens, dim]. `block` is the index of the block, n_layers
/// for the MTP block. `compressed_rope` is the table of layers with ratio > 0, for the blocks' own
/// positions.
AttentionOutput attention_forward(const Attention& attn,
                                  const ModelConfig& config,
                                  int64_t block,
                                  const ops::ProductInput& x,
                                  const ops::RopeTable& compressed_rope,
                                  const ForwardContext& context);

/// The latents of a window layer of their wkv products [tokens, head_dim]: normalised, rotated, in
/// `released` through their round trip.
at::Tensor window_latents(const Attention& attn,
                          const ModelConfig& config,
                          const at::Tensor& product,
                          const at::Tensor& cos_sin,
                          ops::Numerics numerics);
/// Puts them into the window ring of block `block` of the context's cache, for passes to come.
void keep_window_latents(const Attention& attn,
                         const ModelConfig& config,
                         int64_t block,
                         const at::Tensor& product,
                         const at::Tensor& cos_sin,
                         const ForwardContext& context);

}  // namespace hadal::model
