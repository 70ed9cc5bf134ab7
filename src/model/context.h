// What one forward pass is told.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/aux.h"
#include "model/choices.h"
#include "model/kv_access.h"
#include "ops/cache/batch.h"
#include "ops/op.h"

namespace hadal::model {

class RowPart;

/// How CSA layers attend (model.md 17.5): to every visible block, ignoring the indexer; the same
/// while the indexer learns from the attention; or to the indexer's choice.
enum class AttentionMode { kDense, kIndexerWarmup, kSparse };

/// Of one pass over one batch.
struct ForwardContext {
  const ops::Batch* batch = nullptr;
  ops::Numerics numerics = ops::Numerics::kReleased;
  AttentionMode mode = AttentionMode::kSparse;
  /// Where several ranks share the places of a row: `batch` is its batch(), and attention asks the
  /// others for what came before. It lives until the backward pass is over. Null: whole samples.
  const RowPart* part = nullptr;
  KvAccess* kv = nullptr;  ///< null: training or a one-shot pass, every sequence from position 0
  AuxRequest request;      ///< what every block returns beside its streams
  /// By block: what it is made to choose. Undefined parts and blocks beyond the end are free.
  std::vector<BlockChoices> forced;
  /// Transformer::forward() also returns what the DSpark drafter reads.
  bool target_means = false;
  /// The backward pass computes blocks again instead of keeping their graphs (run_block()).
  bool recompute = false;

  /// cos and sin of every token: window layers and compressed layers. Filled by the model.
  at::Tensor rope_window, rope_compressed;
  /// Of the blocks that the step completes, by ratio.
  std::map<int64_t, at::Tensor> rope_blocks;

  BlockChoices forced_of(int64_t block) const {
    const auto index = static_cast<size_t>(block);
    return index < forced.size() ? forced[index] : BlockChoices{};
  }
};

}  // namespace hadal::model
