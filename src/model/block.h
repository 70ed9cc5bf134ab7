// One block: hyper-connections around attention and around experts (model.md 3), and what the
// blocks of a model have in common.
#pragma once

#include <functional>

#include <ATen/core/Tensor.h>

#include "model/attention.h"
#include "model/config.h"
#include "model/context.h"
#include "model/moe.h"
#include "model/parameter.h"
#include "ops/attention/rope.h"
#include "ops/mhc/hyper_connection.h"

namespace hadal::model {

struct HyperConnection {
  Parameter fn, base, scale;
};

struct Block {
  Parameter attn_norm, ffn_norm;
  HyperConnection hc_attn, hc_ffn;
  Attention attn;
  Moe moe;
};

struct BlockOutput {
  at::Tensor streams;  ///< [tokens, hc_mult, dim]
  BlockAux aux;        ///< what the context's request names
};

/// streams [tokens, hc_mult, dim] through block `index` (n_layers: the MTP block); ids [tokens] of
/// the tokens whose states they are.
BlockOutput block_forward(const Block& block,
                          const ModelConfig& config,
                          int64_t index,
                          at::Tensor streams,
                          const at::Tensor& ids,
                          const ops::RopeTable& compressed_rope,
                          const ForwardContext& context);

/// Attention of a block: its rows after attn_norm -> [tokens, dim].
using Attend = std::function<AttentionOutput(const ops::ProductInput& x)>;
/// A block around an attention of another kind. `index` is its number for forced experts; of the
/// context only numerics, request and forced choices are read.
BlockOutput block_around(const Block& block,
                         const ModelConfig& config,
                         int64_t index,
                         at::Tensor streams,
                         const at::Tensor& ids,
                         const ForwardContext& context,
                         const Attend& attend);

ops::HcParams hc_params(const ModelConfig& config);
/// The collapse of the streams and the norm behind it: [tokens, dim].
at::Tensor collapse(const at::Tensor& streams,
                    const HyperConnection& head,
                    const Parameter& norm,
                    const ModelConfig& config,
                    ops::Numerics numerics);

}  // namespace hadal::model
