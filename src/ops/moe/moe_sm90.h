// Rows of tokens to their experts and back on Hopper, as functions of pointers. Free of ATen.
#pragma once

#include "ops/gemm/linear_sm90.h"
#include "ops/kernel_types.h"
#include "ops/moe/gate_sm90.h"

namespace hadal::ops {

/// Sorts the choices of all tokens by expert, tokens ascending, every expert's rows from a multiple
/// of 8 on. One run an expert that anybody chose, experts ascending.
struct RouteSm90Params {
  const int32_t* experts;  ///< [tokens, topk] expert ids of a token, all different, ascending
  const float* weights;    ///< [tokens, topk]
  int32_t* source;         ///< [rows] token of a row, -1 where there is none
  float* row_weight;       ///< [rows] 0 where there is none
  int32_t* place;          ///< [tokens, topk] row of a choice
  ExpertRun* runs;         ///< [min(num_experts, tokens * topk)]
  int32_t* num_runs;       ///< [1]
  int64_t tokens, topk, num_experts;  ///< num_experts: at most 1,024
  int64_t rows;                       ///< of source and row_weight: at least max_routed_rows
  /// [num_experts] for steps of many tokens, whose choices several blocks count; null: one block.
  int32_t* counts = nullptr;
};
void route_sm90(const RouteSm90Params& p, Stream stream);
void route_twin(const RouteSm90Params& p);  ///< the same on a CPU

/// gate_sm90 and route_sm90 of what it chose, as one kernel, for few tokens; route's experts,
/// weights and numbers are the gate's.
struct GateRouteSm90Params {
  GateSm90Params gate;
  RouteSm90Params route;
};
inline constexpr int64_t kGateRouteTokens = 16, kGateRouteScores = 4096;
inline bool serves_gate_route_sm90(int64_t tokens, int64_t num_experts, int64_t topk) {
  return serves_gate_sm90(num_experts, topk) && tokens <= kGateRouteTokens &&
         tokens * num_experts <= kGateRouteScores;
}
void gate_route_sm90(const GateRouteSm90Params& p, Stream stream);
void gate_route_twin(const GateRouteSm90Params& p);  ///< the same on a CPU

/// Whether swiglu_sm90 and combine_sm90 take rows of `width` values.
inline bool serves_moe_rows_sm90(int64_t width) { return width % 4 == 0; }

/// SwiGLU of rows (swiglu.h), in BF16.
struct SwigluSm90Params {
  const void *gate, *up;  ///< [rows, inter] BF16
  const float* weight;    ///< [rows], or null for ones
  void* out;              ///< [rows, inter] BF16
  int64_t rows, inter;    ///< inter: a multiple of 4
  float limit;
};
void swiglu_sm90(const SwigluSm90Params& p, Stream stream);
void swiglu_twin(const SwigluSm90Params& p);  ///< the same on a CPU

/// out[t] = the rows of t's choices in order, then the shared expert's, added in FP32; one
/// rounding.
struct CombineSm90Params {
  const void* rows;           ///< [.., dim] BF16
  const int32_t* place;       ///< [tokens, topk]
  const void* shared;         ///< [tokens, dim] BF16
  void* out;                  ///< [tokens, dim] BF16
  int64_t tokens, topk, dim;  ///< dim: a multiple of 4
};
void combine_sm90(const CombineSm90Params& p, Stream stream);
void combine_twin(const CombineSm90Params& p);  ///< the same on a CPU

}  // namespace hadal::ops
