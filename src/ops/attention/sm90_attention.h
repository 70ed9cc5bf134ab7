// Attention of tensors on a GPU by the Hopper kernels (sparse_attn_sm90.h), over latents as
// they are cached. Compared with the twin by ops/sm90_cache_gpu_test.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/attention/sparse_attn.h"

namespace hadal::ops {

/// Whether attention over packed latents of such rows has a kernel, whatever the queries: a layer
/// asks before it packs its own.
bool serves_latents_sm90(const RowFormat& format);
/// Numerics that round probabilities; BF16 queries of any number of heads of 64 to 512 channels, a
/// multiple of 64; rings and blocks both packed with 64 rotary channels, or both in BF16 or absent
/// (a step without a cache reads its own rows). Rows that lie one after the other.
bool serves_attention_sm90(const at::Tensor& q,
                           const RingView& history,
                           const BlockView& blocks,
                           const AttentionParams& params);

/// As refuse_as_hopper(), with the heads and the numerics.
void refuse_attention_as_hopper(const at::Tensor& q, const AttentionParams& params);

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
