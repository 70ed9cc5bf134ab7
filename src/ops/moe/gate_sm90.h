// The choice of experts on Hopper, as functions of pointers, and its twin on the CPU (gate.h has
// the definition). The affinity's softplus is that of ops/exact_math.h, in FP64 as the CPU's: the
// same bits, but where the C library's and ours round to different FP32 values. Free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

/// The topk experts of largest affinity + bias, or those that a table names for the token.
struct GateSm90Params {
  const float* logits;   ///< [tokens, num_experts]
  const float* bias;     ///< [num_experts]; null: the table names the experts
  const int64_t* table;  ///< [.., topk] by token id, distinct within a row; or null
  const int64_t* ids;    ///< [tokens] token ids for the table; null: its rows are the tokens'
  int32_t* experts;      ///< [tokens, topk] ascending
  float* weights;        ///< [tokens, topk] affinity over the sum of the chosen, times scale
  int64_t tokens, num_experts, topk;  ///< at most 1,024 experts, 32 of them chosen
  float scale;
  float* affinity = nullptr;  ///< [tokens, num_experts], or null
};
/// Whether there is a kernel for so many experts and choices.
inline bool serves_gate_sm90(int64_t num_experts, int64_t topk) {
  return num_experts <= 1024 && topk <= 32 && topk <= num_experts;
}
void gate_sm90(const GateSm90Params& p, Stream stream);

/// The same on a CPU.
void gate_twin(const GateSm90Params& p);

}  // namespace hadal::ops
