// The DeepSeek-V4 model: weights and the one forward pass that training, prefill, decode and
// resumption share.
//
// The model owns weights; the caller owns state (ForwardContext::kv). Hidden states are residual
// streams [tokens, hc_mult, dim].
#pragma once

#include <functional>

#include <ATen/core/Tensor.h>

#include "model/block.h"
#include "model/config.h"
#include "model/context.h"
#include "model/describe.h"
#include "model/drafter.h"
#include "model/parameter.h"
#include "ops/attention/rope.h"

namespace hadal::model {

struct ForwardOutput {
  at::Tensor streams;         ///< [tokens, hc_mult, dim] behind the last main block
  std::vector<BlockAux> aux;  ///< [n_layers] what the context's request names
  /// [tokens, target layers * dim] where the context asks (drafter.h)
  at::Tensor target_means = {};
};

class Transformer {
 public:
  /// Every parameter with name, role and shape but no value: fill them from a checkpoint or with
  /// init_weights().
  explicit Transformer(ModelConfig config);

  const ModelConfig& config() const { return config_; }

  /// Fills context.rope_* and runs embedding and main blocks on ids [tokens] I64. Throws Error for
  /// forced choices that no pass can make (check_choices()), as all parts do, before any block
  /// runs.
  ForwardOutput forward(const at::Tensor& ids, ForwardContext& context) const;
  /// Its parts, for who looks at every block in turn or gives layers different tokens (a context
  /// each): ids -> streams in front of layer 0, and streams through one main block. run_layer()
  /// fills context.rope_* where a context has none yet.
  at::Tensor embed(const at::Tensor& ids, ops::Numerics numerics) const;
  /// Rows of the embedding alone: ids [tokens] -> [tokens, dim]. `master`: a leaf of the
  /// embedding's values that their gradient goes to; undefined: the embedding's own.
  at::Tensor embedding_rows(const at::Tensor& ids,
                            ops::Numerics numerics,
                            const at::Tensor& master = {}) const;
  BlockOutput run_layer(int64_t layer,
                        at::Tensor streams,
                        const at::Tensor& ids,
                        ForwardContext& context) const;
  /// Collapse, final norm: streams -> [tokens, dim], the input of the head.
  at::Tensor head_input(const at::Tensor& streams, ops::Numerics numerics) const;
  /// The head's matrix [vocab, dim] as the numerics uses it, for losses that never hold all logits.
  at::Tensor head_operand(ops::Numerics numerics) const {
    return parameters_.head.operand(numerics);
  }
  /// The values that embed() looks up: what the gradient of the embedding goes to.
  const at::Tensor& embedding_master() const { return parameters_.embed.value; }
  /// The values that it is made of: what the gradient of the head goes to.
  const at::Tensor& head_master() const { return parameters_.head.value; }
  /// [tokens, dim] -> [tokens, vocab] FP32.
  at::Tensor logits(const at::Tensor& head_input, ops::Numerics numerics) const;

  /// The MTP block: streams of the last main block at p and the ids of the tokens at p + 1 -> its
  /// head input, which predicts the token at p + 2. `context` is the one forward() was given, or a
  /// new one with a batch of its own, whose rope_* it fills.
  MtpOutput mtp(const at::Tensor& streams,
                const at::Tensor& next_ids,
                ForwardContext& context) const;
  /// The same from embedding_rows() of those ids, which another process may have computed.
  MtpOutput mtp(const at::Tensor& streams,
                const at::Tensor& next_ids,
                const at::Tensor& rows,
                ForwardContext& context) const;

  /// The DSpark drafter, without stages where the model has none.
  const Drafter& drafter() const { return parameters_.drafter; }
  /// Whether it reads the streams behind this main layer.
  bool is_target(int64_t layer) const;
  /// The model without it: for training, which moves every parameter that it visits.
  void drop_drafter();
  /// Its context rows of the context's tokens [tokens, target layers * dim], of all stages, into
  /// the context's cache (blocks n_layers ...). `context` as for mtp().
  void keep_draft_context(const at::Tensor& target_means, ForwardContext& context) const;
  /// Blocks of drafts; what `blocks` says is in drafter.h, as is `trace`.
  DraftedBlocks draft(const DraftBlocks& blocks,
                      ops::Numerics numerics,
                      DraftTrace* trace = nullptr) const;
  /// What rows of them say behind the tokens before (drafter.h).
  DraftScores draft_scores(const DraftedBlocks& blocks,
                           const at::Tensor& rows,
                           const at::Tensor& previous,
                           ops::Numerics numerics) const {
    return model::draft_scores(parameters_.drafter, blocks, rows, previous, numerics);
  }

  /// Every parameter, in the order of model/describe.h.
  void visit(const std::function<void(Parameter&)>& visitor);
  void visit(const std::function<void(const Parameter&)>& visitor) const;

 private:
  void fill_rope(ForwardContext& context) const;
  /// The same where the context has none; tables of another number of tokens are an error.
  void ensure_rope(ForwardContext& context) const;
  void check_forced(int64_t block, const ForwardContext& context) const;
  BlockOutput run_checked(int64_t layer,
                          at::Tensor streams,
                          const at::Tensor& ids,
                          const ForwardContext& context) const;

  ModelConfig config_;
  ModelParameters parameters_;
  ops::RopeTable rope_window_, rope_compressed_;
};

}  // namespace hadal::model
