// The balance loss of one row on the CPU (model.md 17.6): sum_i f_i P_i, where f counts choices and
// P averages normalised affinities over the row's tokens.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace hadal::ops {

/// [experts] FP32: the sum of share [tokens, experts] over tokens by the tree of sum_tree.h.
/// Without gradients.
at::Tensor share_sums(const at::Tensor& share);

/// [] FP32. Its gradient goes to the shares of the pass's tokens.
///   share   [tokens, experts] FP32 normalised affinities
///   sums    [experts]         share_sums of the whole row
///   chosen  [experts] I64     choices of the whole row
at::Tensor balance_loss(const at::Tensor& share,
                        const at::Tensor& sums,
                        const at::Tensor& chosen,
                        int64_t row_length,
                        int64_t topk);

}  // namespace hadal::ops
