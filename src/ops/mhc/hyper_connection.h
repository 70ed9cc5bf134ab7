// Manifold-constrained hyper-connections (model.md 3): mixing n residual streams into a
// sub-layer's input, its output back into the streams, and the collapse before the head.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "ops/gemm/normalised_input.h"
#include "ops/recorded_graph.h"

namespace hadal::ops {

struct HcParams {
  int64_t sinkhorn_iters = 20;
  double norm_eps = 1e-6;  ///< inside the RMS over all streams, and of the norm behind
  double hc_eps = 1e-6;    ///< added to collapse weights and Sinkhorn entries and sums
};

struct HcPre {
  at::Tensor mixed;  ///< [tokens, dim]               input of the sub-layer's norm, streams' dtype
  at::Tensor post;   ///< [tokens, streams] FP32      c, expand weights of the sub-layer's output
  at::Tensor comb;   ///< [tokens, streams, streams]  P, FP32, row = source, column = destination
};

/// Mix-in, all arithmetic FP32.
///   streams  [tokens, n, dim]
///   fn       [(2 + n) n, n dim]  FP32: rows 0..n-1 collapse, n..2n-1 expand, then P row by row
///   base     [(2 + n) n]         FP32
///   scale    [3]                 FP32: collapse, expand, combination
HcPre hc_pre(const at::Tensor& streams,
             const at::Tensor& fn,
             const at::Tensor& base,
             const at::Tensor& scale,
             const HcParams& params);

/// Mix-out: new[k] = post[k] * out + sum_j comb[j, k] * streams[j], one rounding to the streams'
/// dtype.
///   out  [tokens, dim]
at::Tensor hc_post(const at::Tensor& out,
                   const at::Tensor& streams,
                   const at::Tensor& post,
                   const at::Tensor& comb);

/// Collapse at the top: fn [n, n dim], base [n], scale [1]; no Sinkhorn. Result [tokens, dim].
at::Tensor hc_head(const at::Tensor& streams,
                   const at::Tensor& fn,
                   const at::Tensor& base,
                   const at::Tensor& scale,
                   const HcParams& params);

/// hc_pre and the RMSNorm of what it mixes, as a sub-layer's input: `norm` [dim], eps; see
/// normalised_input. `comb_beside` is to be joined before comb is read.
struct HcInput {
  ProductInput input;
  at::Tensor post, comb;  ///< as of HcPre; comb may be made on `comb_beside`
};
HcInput hc_pre_normalised(const at::Tensor& streams,
                          const at::Tensor& fn,
                          const at::Tensor& base,
                          const at::Tensor& scale,
                          const HcParams& params,
                          const at::Tensor& norm,
                          Numerics numerics,
                          OperandKinds kinds,
                          SideBranch& comb_beside);

namespace reference {
HcPre hc_pre(const at::Tensor& streams,
             const at::Tensor& fn,
             const at::Tensor& base,
             const at::Tensor& scale,
             const HcParams& params);
at::Tensor hc_post(const at::Tensor& out,
                   const at::Tensor& streams,
                   const at::Tensor& post,
                   const at::Tensor& comb);
at::Tensor hc_head(const at::Tensor& streams,
                   const at::Tensor& fn,
                   const at::Tensor& base,
                   const at::Tensor& scale,
                   const HcParams& params);
/// logits [tokens, n, n] -> doubly stochastic P: softmax over destinations, then alternating column
/// and row normalisation, `iters` of each, ending on columns.
at::Tensor sinkhorn(const at::Tensor& logits, int64_t iters, double eps);
}  // namespace reference

}  // namespace hadal::ops
