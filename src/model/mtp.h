// Multi-token prediction (model.md 13): one more block that predicts the token after the next.
#pragma once

#include <ATen/core/Tensor.h>

#include "model/block.h"

namespace hadal::model {

struct Mtp {
  Parameter e_proj, h_proj, enorm, hnorm, norm;
  HyperConnection hc_head;
  Block block;
};

struct MtpOutput {
  at::Tensor head_input;  ///< [tokens, dim]
  BlockAux aux;           ///< of the MTP block
};

/// Streams of the last main block at p and the ids of the tokens at p + 1 -> head input [tokens,
/// dim].
///   rows  [tokens, dim] of the main model's embedding, of those ids
MtpOutput mtp_forward(const Mtp& mtp,
                      const ModelConfig& config,
                      const at::Tensor& rows,
                      const at::Tensor& streams,
                      const at::Tensor& next_ids,
                      const ops::RopeTable& compressed_rope,
                      const ForwardContext& context);

}  // namespace hadal::model
