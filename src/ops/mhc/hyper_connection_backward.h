// Hyper-connections with gradients of our own on the CPU: four streams, FP32 or BF16.
//
// Per token the gradient is that of hc_math.h; fn, base and scale are sums over tokens by the tree
// of sum_tree.h. Compared with float64, and over instruction sets, by
// ops/backward_kernel_bits_test.cpp.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/mhc/hyper_connection.h"
#include "ops/op.h"

namespace hadal::ops {

/// Whether these streams have such gradients.
bool serves_hc_gradient(const at::Tensor& streams, const HcParams& params);

/// What `forward` makes of {streams, fn, base, scale}: {mixed, post, comb}, or {mixed} for the head
/// (collapse weights alone), with that gradient.
std::vector<at::Tensor> with_hc_pre_gradient(const TensorFunction& forward,
                                             const std::vector<at::Tensor>& inputs,
                                             const HcParams& params,
                                             bool head);
/// What `forward` makes of {out, streams, post, comb}: {result}.
std::vector<at::Tensor> with_hc_post_gradient(const TensorFunction& forward,
                                              const std::vector<at::Tensor>& inputs);

}  // namespace hadal::ops
