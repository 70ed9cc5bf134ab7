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
///   chunk    tokens whose logits are held at a time
///   master   [vocab, dim] what the head is rounded from: on the CPU it gets the head's gradient
///            in FP32; undefined: the head itself
///   result   [] FP32 (FP64 for FP64 input); on the CPU a sum by the tree of sum_tree.h
at::Tensor linear_cross_entropy(const at::Tensor& hidden,
                                const at::Tensor& head,
                                const at::Tensor& targets,
                                int64_t chunk = 4096,
                                const at::Tensor& master = {});

namespace reference {
at::Tensor linear_cross_entropy(const at::Tensor& hidden,
                                const at::Tensor& head,
                                const at::Tensor& targets);
}  // namespace reference

}  // namespace hadal::ops
