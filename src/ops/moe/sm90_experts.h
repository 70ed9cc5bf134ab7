// The routed experts of a layer on a GPU as one chain of Hopper kernels (moe_sm90.h): rows are
// sorted, rounded and multiplied without going back to the order of tokens in between. The bits of
// permute_rows, grouped_linear, swiglu and combine one after the other
// (ops/gemm/sm90_products_gpu_test.cpp).
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/gemm/product_input.h"
#include "ops/gemm/sm90_products.h"
#include "ops/gemm/weight.h"
#include "ops/moe/gate.h"
#include "ops/recorded_graph.h"

namespace hadal::ops {

struct RoutedExperts {
  const Weight &w1, &w3, &w2;  ///< [experts, inter, dim] twice, [experts, dim, inter]
  double swiglu_limit;
};

/// Where the rows of a step's choices go (route_sm90).
struct ExpertRoute {
  at::Tensor source, weight;  ///< [rows] I32, FP32
  at::Tensor place;           ///< [tokens, topk] I32
  ExpertRuns runs;
  int64_t rows = 0;
};
ExpertRoute route_on_sm90(const Routing& routing, int64_t num_experts);

/// What a token's experts are chosen from: `bias`, or a table that names them.
struct GateInput {
  at::Tensor logits;  ///< [tokens, num_experts] FP32, of a product on the device
  at::Tensor bias;    ///< [num_experts] FP32; undefined: the table
  at::Tensor table;   ///< [.., topk] I64, distinct within a row
  at::Tensor ids;     ///< [tokens] I64, rows of the table; undefined: its rows are the tokens'
  int64_t topk = 0;
  double route_scale = 1.0;
};
/// Whether one kernel chooses and routes: few tokens.
bool serves_gate_route_sm90(const GateInput& in);
/// gate or gate_fixed, without affinities, and route_on_sm90 of what they chose.
ExpertRoute gate_and_route_sm90(const GateInput& in, Routing& routing);

/// BF16 x, weights with a kernel (serves_grouped_sm90) that all round their rows, in `released`, or
/// none, in other numerics; dim and inter multiples of 4.
bool serves_experts_sm90(const at::Tensor& x, const RoutedExperts& experts, Numerics numerics);

/// sum over a token's experts of weight * expert(x), plus `shared`.
///   x, shared  [tokens, dim] BF16; x, and what goes to w2, is rounded by Q8_128 where weights are
///              FP4 or FP8
///   shared_beside  what `shared` is made on: joined before it is read
at::Tensor experts_on_sm90(const at::Tensor& x,
                           const ExpertRoute& route,
                           const RoutedExperts& experts,
                           const at::Tensor& shared,
                           SideBranch& shared_beside);

/// Whether the shared expert's matrices, FP8, have a chain of kernels, too.
bool serves_shared_expert_sm90(const ProductInput& x, const RoutedExperts& shared);
/// w2 of SwiGLU of w1 and w3 of x: [tokens, dim] BF16.
at::Tensor shared_expert_on_sm90(const ProductInput& x, const RoutedExperts& shared);

}  // namespace hadal::ops
