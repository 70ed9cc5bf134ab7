// What a block gives beside its streams: auxiliary terms of the training loss, choices, and what
// observers measure. Every part is there only where it was asked for (AuxRequest).
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/cache/batch.h"
#include "ops/indexer/index_kl.h"
#include "ops/moe/gate.h"

namespace hadal::model {

/// Which parts of BlockAux a pass returns. Nothing here changes a bit of the streams.
struct AuxRequest {
  bool experts = false;       ///< MoeAux::routing, its experts alone
  bool routing = false;       ///< MoeAux::routing
  bool swiglu = false;        ///< MoeAux::swiglu
  bool selection = false;     ///< AttentionAux::selection
  bool index_scores = false;  ///< AttentionAux::index_scores
  bool index_loss = false;    ///< AttentionAux::index_loss
  bool attention = false;     ///< AttentionAux::seen
};

/// What measures of an attention need (ops::selected_mass); without gradients.
struct SeenAttention {
  at::Tensor q;           ///< [tokens, n_heads, head_dim] normalised and rotated
  ops::BlockView blocks;  ///< every visible compressed block; no rows in window layers
  at::Tensor lse;         ///< [tokens, n_heads]
};

struct AttentionAux {
  /// [tokens, index_topk] I32: a CSA layer's choice; undefined where every query takes every
  /// visible block, and in other layers.
  at::Tensor selection;
  /// [tokens, columns] FP32: a CSA layer's scores, -inf where not visible; undefined elsewhere and
  /// in dense passes without a cache, which do not run the indexer. Without gradients.
  at::Tensor index_scores;
  /// Of a CSA layer; `sum` undefined elsewhere. Gradients go to the indexer alone.
  ops::IndexKl index_loss;
  SeenAttention seen;
};

/// What a clamped SwiGLU is given, without gradients.
struct SwigluInput {
  at::Tensor gate, up;  ///< [rows, moe_inter_dim]
};

struct MoeAux {
  /// Experts, weights and affinities; gradients go through `affinity` alone.
  ops::Routing routing;
  std::vector<SwigluInput> swiglu;  ///< the routed experts' rows, then the shared expert's
};

struct BlockAux {
  AttentionAux attn;
  MoeAux moe;
};

}  // namespace hadal::model
