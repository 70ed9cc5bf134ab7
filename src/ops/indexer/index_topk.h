// The lightning indexer's choice (model.md 8): the causal top-k of compressed blocks, ties to the
// lower one.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/cache/batch.h"
#include "ops/op.h"

namespace hadal::ops {

/// The min(k, visible) blocks with the largest scores, ties to the lower block, ascending, then -1.
/// result [tokens, k] I32. Nothing is differentiated through the choice.
at::Tensor index_topk(const at::Tensor& q,
                      const at::Tensor& w,
                      const BlockView& keys,
                      const Batch& batch,
                      int64_t ratio,
                      int64_t k,
                      Numerics numerics);

/// The choice alone, from scores as index_scores gives them (NaN counts as the lowest).
at::Tensor select_topk(const at::Tensor& scores, const Batch& batch, int64_t ratio, int64_t k);

namespace reference {
at::Tensor select_topk(const at::Tensor& scores, const Batch& batch, int64_t ratio, int64_t k);
}  // namespace reference

}  // namespace hadal::ops
