// What one forward pass is told and what it reports besides hidden states.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/kv_access.h"
#include "ops/cache/batch.h"
#include "ops/moe/gate.h"
#include "ops/op.h"

namespace hadal::model {

/// How CSA layers attend (model.md 17.5): to every visible block, ignoring the indexer; the same
/// while the indexer learns from the attention; or to the indexer's choice.
enum class AttentionMode { kDense, kIndexerWarmup, kSparse };

struct ForwardContext {
  const ops::Batch* batch = nullptr;
  ops::Numerics numerics = ops::Numerics::kReleased;
  AttentionMode mode = AttentionMode::kSparse;
  KvAccess* kv = nullptr;  ///< null: training or a one-shot pass, every sequence from position 0

  /// cos and sin of every token: window layers and compressed layers.
  at::Tensor rope_window, rope_compressed;

  /// Observers, all optional.
  std::function<void(int64_t block, const at::Tensor& streams)> on_block;
  /// A CSA layer's choice [tokens, k] and the scores [tokens, columns] it was made from.
  std::function<void(int64_t block, const at::Tensor& selection, const at::Tensor& scores)>
      on_selection;
  /// A CSA layer's choice [tokens, k], where it makes one; asks for nothing that is not computed
  /// anyway.
  std::function<void(int64_t block, const at::Tensor& selection)> on_choice;
  std::function<void(int64_t block, const ops::Routing& routing)> on_routing;
  /// What the clamped SwiGLU of a block is given, for counters; the routed experts' rows, then the
  /// shared expert's.
  std::function<void(int64_t block, const at::Tensor& gate, const at::Tensor& up)> on_swiglu;
  /// Gets the indexer's loss of a CSA layer, summed over queries, and the number of queries with a
  /// visible block; asked for in training only.
  std::function<void(int64_t block, const at::Tensor& kl_sum, int64_t num_queries)> on_index_loss;
  /// Gets what measures of an attention need (ops::selected_mass): queries, blocks, log-sum-exp,
  /// selection.
  std::function<void(int64_t block,
                     const at::Tensor& q,
                     const ops::BlockView& blocks,
                     const at::Tensor& lse,
                     const at::Tensor& selection)>
      on_attention;
};

}  // namespace hadal::model
