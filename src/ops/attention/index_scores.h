// Lightning indexer (model.md 8): scores of compressed blocks and the causal top-k among them.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/batch.h"
#include "ops/op.h"

namespace hadal::ops {

/// I[t, c] = sum_h relu(q[t, h] . key[c]) * w[t, h] for the blocks c < floor((p + 1) / ratio) of
/// token t's sequence, -inf beyond. In `released` the dot products, the products with w and the sum
/// are rounded to BF16.
///   q     [tokens, heads, dim]   rotated and quantised
///   w     [tokens, heads]        scaled by dim^-1/2 heads^-1/2
///   keys  rows [*, dim]
///   result [tokens, num_columns] FP32 (FP64), num_columns = largest visible count of the batch
at::Tensor index_scores(const at::Tensor& q,
                        const at::Tensor& w,
                        const BlockView& keys,
                        const Batch& batch,
                        int64_t ratio,
                        Numerics numerics);

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
at::Tensor index_scores(const at::Tensor& q,
                        const at::Tensor& w,
                        const BlockView& keys,
                        const Batch& batch,
                        int64_t ratio,
                        Numerics numerics);
at::Tensor select_topk(const at::Tensor& scores, const Batch& batch, int64_t ratio, int64_t k);
}  // namespace reference

}  // namespace hadal::ops
