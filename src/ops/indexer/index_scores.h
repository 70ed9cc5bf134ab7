// Lightning indexer (model.md 8): scores of compressed blocks. The choice among them: index_topk.h.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/cache/batch.h"
#include "ops/op.h"

namespace hadal::ops {

/// I[t, c] = sum_h relu(q[t, h] . key[c]) * w[t, h] for the blocks c < floor((p + 1) / ratio) of
/// token t's sequence, -inf beyond. In `released` the dot products, the products with w and the sum
/// are rounded to BF16.
///   q     [tokens, heads, dim]   rotated and quantised
///   w     [tokens, heads]        scaled by dim^-1/2 heads^-1/2
///   keys  rows [*, dim], rotated and quantised
///   result [tokens, num_columns] FP32 (FP64), num_columns = largest visible count of the batch
at::Tensor index_scores(const at::Tensor& q,
                        const at::Tensor& w,
                        const BlockView& keys,
                        const Batch& batch,
                        int64_t ratio,
                        Numerics numerics);

namespace reference {
at::Tensor index_scores(const at::Tensor& q,
                        const at::Tensor& w,
                        const BlockView& keys,
                        const Batch& batch,
                        int64_t ratio,
                        Numerics numerics);
}  // namespace reference

}  // namespace hadal::ops
