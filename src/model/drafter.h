// The DSpark drafter of V4-0731 (model.md 13.1): a few window layers that draft a block of tokens
// in one pass.
//
// It reads the streams of some main layers. Each stage has a row of context a position, made of
// those alone. A block is the anchor, the last token chosen and not processed yet, with noise
// tokens behind it; it attends to the last `window` rows of context and to all of itself, later
// tokens included. Row i of a block predicts the token i + 1 positions behind the anchor; what the
// token before says comes on top when that is known (draft_scores). It is only ever proposed.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/block.h"
#include "model/config.h"
#include "model/parameter.h"
#include "ops/attention/rope.h"
#include "ops/cache/batch.h"

namespace hadal::model {

/// A window layer with learned routing; what it reads from the main model comes in through the
/// first stage, the heads sit on the last.
struct DrafterStage {
  Block block;
  Parameter main_proj, main_norm;  ///< of the first
  Parameter norm;                  ///< this and what follows: of the last
  HyperConnection hc_head;
  Parameter markov_w1, markov_w2, confidence;
};

struct Drafter {
  std::vector<DrafterStage> stages;
};

/// streams [tokens, hc_mult, dim] behind a target layer -> their plain mean [tokens, dim], one
/// rounding.
at::Tensor stream_mean(const at::Tensor& streams);

/// Means of the target layers, in the order of the layers, [tokens, target layers * dim] -> the
/// rows [tokens, dim] that every stage makes its context of.
ops::ProductInput draft_input(const Drafter& drafter,
                              const ModelConfig& config,
                              const at::Tensor& target_means,
                              ops::Numerics numerics);

/// One block for each of some sequences.
struct DraftBlocks {
  std::vector<int64_t> anchors;  ///< [sequences] tokens
  std::vector<int64_t> starts;   ///< [sequences] their positions, at least 1
  /// [stages] rows of the context, [sum of min(window, start), head_dim]: of each sequence those of
  /// its last positions before the anchor, in order.
  std::vector<at::Tensor> context;
};

struct DraftedBlocks {
  at::Tensor hidden;  ///< [sequences * block_size, dim] behind the collapse, before the norm
  at::Tensor logits;  ///< [sequences * block_size, vocab] FP32, whatever the token before
};

/// What a block goes through, for tests: by stage.
struct DraftTrace {
  std::vector<at::Tensor> block_kv;  ///< [tokens, head_dim]
  std::vector<at::Tensor> attn_out;  ///< [tokens, dim]
  std::vector<at::Tensor> out;       ///< [tokens, hc_mult, dim]
};

/// What all stages share of a pass.
struct DraftPlan {
  at::Tensor ids;      ///< [tokens] I64: anchor, noise, noise, ... of every sequence
  at::Tensor cos_sin;  ///< [tokens, rotary / 2, 2]
  at::Tensor list;     ///< [rows] I64: which rows of context and block a sequence sees, in order
  ops::Batch batch;    ///< of the lists: see draft_hidden
  int64_t list_ratio;  ///< of the batch's blocks, which are the rows of the lists
  std::vector<int64_t> first_rows;  ///< [sequences] of each list
};
/// Errors: Error for blocks that cannot be.
DraftPlan plan_draft(const DraftBlocks& blocks,
                     const ModelConfig& config,
                     const ops::RopeTable& window_rope);

/// The stages and the collapse: streams [tokens, hc_mult, dim] of the plan's ids ->
/// DraftedBlocks::hidden.
at::Tensor draft_hidden(const Drafter& drafter,
                        const ModelConfig& config,
                        const DraftPlan& plan,
                        at::Tensor streams,
                        const DraftBlocks& blocks,
                        ops::Numerics numerics,
                        DraftTrace* trace);

struct DraftScores {
  at::Tensor logits;      ///< [n, vocab] FP32
  at::Tensor confidence;  ///< [n] FP32, before the sigmoid: that a draft of this row is accepted if
                          ///< those before it are
};
/// Of rows `rows` [n] I64 of the blocks behind the tokens `previous` [n] I64.
DraftScores draft_scores(const Drafter& drafter,
                         const DraftedBlocks& blocks,
                         const at::Tensor& rows,
                         const at::Tensor& previous,
                         ops::Numerics numerics);

}  // namespace hadal::model
