// The indexer of tensors on a GPU by the Hopper kernels (index_scores_sm90.h), over keys as they
// are cached. Compared with the twin by ops/sm90_cache_gpu_test.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/cache/batch.h"
#include "ops/op.h"

namespace hadal::ops {

/// BF16 queries of up to 64 heads of 128 channels; `released` and keys packed in pages of 64, or
/// those of a step without a cache, which are packed here; `bf16` and BF16 keys.
bool serves_index_sm90(const at::Tensor& q,
                       const at::Tensor& w,
                       const BlockView& keys,
                       Numerics numerics);

/// As ops::index_scores and ops::index_topk, whose arguments these are; q also packed (kByte,
/// ops/cache/sm90_rows.h), in [tokens, heads, 68].
at::Tensor index_scores_on_sm90(const at::Tensor& q,
                                const at::Tensor& w,
                                const BlockView& keys,
                                const Batch& batch,
                                int64_t ratio,
                                Numerics numerics);
at::Tensor index_topk_on_sm90(const at::Tensor& q,
                              const at::Tensor& w,
                              const BlockView& keys,
                              const Batch& batch,
                              int64_t ratio,
                              int64_t k,
                              Numerics numerics);

}  // namespace hadal::ops
