// Tokens to expert order and back.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace hadal::ops {

/// The token-expert pairs of a step sorted by expert, within an expert by token. All on the device
/// of `experts`.
struct Permutation {
  at::Tensor token;    ///< [pairs] I64 token of each sorted pair
  at::Tensor slot;     ///< [pairs] I64 index token * topk + k of each sorted pair
  at::Tensor place;    ///< [tokens * topk] I64 sorted place of each slot (the inverse of slot)
  at::Tensor offsets;  ///< [num_experts + 1] I64 first pair of each expert
};

///   experts  [tokens, topk] I64
Permutation permute_by_expert(const at::Tensor& experts, int64_t num_experts);

/// x[token] for every pair in sorted order; the gradient of a token sums its pairs in ascending
/// expert id.
///   x  [tokens, dim]
at::Tensor permute_rows(const at::Tensor& x, const Permutation& order);

/// sum over a token's experts, in ascending expert id, of its rows, then plus `shared`; FP32
/// inside, one rounding.
///   rows    [pairs, dim] in sorted order (experts ascending within each token's slots)
///   shared  [tokens, dim]
at::Tensor combine(const at::Tensor& rows, const Permutation& order, const at::Tensor& shared);

}  // namespace hadal::ops
