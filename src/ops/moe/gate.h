// Expert choice and routing weights (model.md 11).
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "ops/op.h"

namespace hadal::ops {

struct Routing {
  at::Tensor experts;  ///< [tokens, topk] I64, of the Hopper kernel I32; ascending within a token
  at::Tensor weights;  ///< [tokens, topk] FP32, of the experts beside them; un-biased, normalised,
                       ///< times route_scale
  at::Tensor
      affinity;  ///< [tokens, num_experts] FP32, sqrt(softplus(logits)): for the balance loss
};

/// sqrt(softplus(x)), with softplus(x) = x above 20.
at::Tensor sqrt_softplus(const at::Tensor& logits);

/// Learned routing: the topk experts with the largest affinity + bias, ties to the lower id. The
/// bias only chooses. On a GPU the kernel serves all numerics but `ideal`.
///   logits  [tokens, num_experts] FP32
///   bias    [num_experts] FP32
Routing gate(const at::Tensor& logits,
             const at::Tensor& bias,
             int64_t topk,
             double route_scale,
             Numerics numerics = Numerics::kReleased);

/// Routing to given experts (hash layers: rows of tid2eid).
///   experts  [tokens, topk] I64, distinct within a row, in any order
Routing gate_fixed(const at::Tensor& logits,
                   const at::Tensor& experts,
                   double route_scale,
                   Numerics numerics = Numerics::kReleased);

}  // namespace hadal::ops
