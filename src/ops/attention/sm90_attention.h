// Attention of tensors on a GPU by the Hopper kernels (sparse_attn_sm90.h), over latents as they
// are cached. Compared with the twin by ops/sm90_cache_gpu_test.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/attention/sparse_attn.h"

namespace hadal::ops {

/// `released`, BF16 queries of a multiple of 64 heads and 512 channels, packed latents with 64
/// rotary channels in rings and blocks, a window of a multiple of 64. (Without a cache, and for
/// other widths, there is no Hopper kernel yet.)
/// What of it the rows of a cache, the heads and the window decide: a layer asks before it packs
/// its latents.
bool serves_latents_sm90(const RowFormat& format, int64_t heads, int64_t window);
bool serves_attention_sm90(const at::Tensor& q,
                           const RingView& history,
                           const BlockView& blocks,
                           const AttentionParams& params);

/// As ops::sparse_attn, whose arguments these are; the bits of sparse_attn_twin, of lists whose
/// places are attn_lists_sm90's.
AttentionResult attention_on_sm90(const at::Tensor& q,
                                  const at::Tensor& kv,
                                  const RingView& history,
                                  const BlockView& blocks,
                                  const at::Tensor& selection,
                                  const at::Tensor& sink,
                                  const Batch& batch,
                                  const AttentionParams& params);

}  // namespace hadal::ops
