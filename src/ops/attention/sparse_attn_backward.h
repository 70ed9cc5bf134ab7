// The gradient of sparse_attn on the CPU, of whole samples and of parts of them.
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
  at::Tensor history;    ///< the ring's rows; or undefined
  at::Tensor blocks;     ///< [*, head_dim]; or undefined
  at::Tensor selection;  ///< [tokens, k] I32; or undefined
  at::Tensor sink;       ///< [heads]
  at::Tensor out;        ///< like q
  at::Tensor lse;        ///< [tokens, heads] FP32
};

struct AttentionGradients {
  /// In the inputs' types; history and blocks undefined where they are.
  at::Tensor q, kv, history, blocks, sink;
};

/// Where keys from before the pass and blocks lie; their rows are in the step.
struct AttentionKeys {
  RingView history;
  std::vector<int64_t> first_blocks;  ///< [num_seqs] row of each sequence's block 0; or empty
};

/// Probabilities are made again from the log-sum-exp; their rounding to BF16 passes gradients
/// through. A key's gradient is one sum over queries by the tree of sum_tree.h, places counted
/// in the pass; of a token what comes by the values, its heads in order, then what comes by the
/// logits. So are the sinks' over tokens. A query's gradient has the bits of any pass in which it
/// stands at the same place modulo 64.
AttentionGradients sparse_attn_backward(const AttentionStep& step,
                                        const at::Tensor& grad_out,
                                        const AttentionKeys& keys,
                                        const Batch& batch,
                                        const AttentionParams& params);

/// What `forward` makes of {q, kv, history, blocks, sink}: {out, lse}, with that gradient. lse has
/// none.
std::vector<at::Tensor> with_attention_gradient(const TensorFunction& forward,
                                                const std::vector<at::Tensor>& inputs,
                                                const at::Tensor& selection,
                                                const RingView& history,
                                                const BlockView& blocks,
                                                const Batch& batch,
                                                const AttentionParams& params);

}  // namespace hadal::ops
