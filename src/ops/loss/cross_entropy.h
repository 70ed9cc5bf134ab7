// Next-token cross-entropy out of hidden states, chunked over tokens: the logits of all tokens
// never exist at once.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace hadal::ops {

/// sum over tokens with target >= 0 of -log softmax(hidden head^T)[target]. The gradients of both
/// inputs are computed with the value and only scaled in the backward pass.
///   hidden   [tokens, dim]
///   head     [vocab, dim]
///   targets  [tokens] I64, -1 = not scored
///   result   [] FP32 (FP64 for FP64 input)
at::Tensor linear_cross_entropy(const at::Tensor& hidden,
                                const at::Tensor& head,
                                const at::Tensor& targets,
                                int64_t chunk = 4096);

namespace reference {
at::Tensor linear_cross_entropy(const at::Tensor& hidden,
                                const at::Tensor& head,
                                const at::Tensor& targets);
}  // namespace reference

}  // namespace hadal::ops
