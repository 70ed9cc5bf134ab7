// The gradient of sparse_attn on the CPU, for steps that nothing came before.
// Compared with float64, and over instruction sets, by ops/backward_kernel_bits_test.cpp.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/attention/sparse_attn.h"
#include "ops/cache/batch.h"

namespace hadal::ops {

/// What the forward pass was given and gave; FP32 or BF16 on the CPU.
struct AttentionStep {
  at::Tensor q;          ///< [tokens, heads, head_dim]
  at::Tensor kv;         ///< [tokens, head_dim]
  at::Tensor blocks;     ///< [blocks of the step, head_dim] in the order of its plan; or undefined
  at::Tensor selection;  ///< [tokens, k] I32; or undefined
  at::Tensor sink;       ///< [heads]
  at::Tensor out;        ///< like q
  at::Tensor lse;        ///< [tokens, heads] FP32
};

struct AttentionGradients {
  at::Tensor q, kv, blocks, sink;  ///< in the inputs' types; blocks undefined where they are
};

/// Probabilities are made again from the log-sum-exp; their rounding to BF16 passes gradients
/// through. A key's gradient is a sum over queries by the tree of sum_tree.h, places counted
/// in the pass, the heads of a token in order; so are the sinks' over tokens.
AttentionGradients sparse_attn_backward(const AttentionStep& step,
                                        const at::Tensor& grad_out,
                                        const Batch& batch,
                                        const AttentionParams& params);

/// What `forward` makes of {q, kv, blocks, sink}: {out, lse}, with that gradient. lse has none.
std::vector<at::Tensor> with_attention_gradient(const TensorFunction& forward,
                                                const std::vector<at::Tensor>& inputs,
                                                const at::Tensor& selection,
                                                const Batch& batch,
                                                const AttentionParams& params);

}  // namespace hadal::ops
