// Attention over a sliding window of raw latents and over compressed ones, with a sink
// (model.md 9).
//
// Keys and values are the same rows. The fold over keys is part of the numerics contract: window
// keys in chunks of 64 absolute positions, then HCA blocks in chunks of 64 absolute block numbers,
// or selected CSA blocks in ascending order in chunks of 64 by rank; per chunk max, rescale, exp,
// FP32 sum, and, but in `ideal`, BF16 probabilities into the value product. The sink enters the
// denominator last.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/cache/batch.h"
#include "ops/op.h"

namespace hadal::ops {

inline constexpr int64_t kFoldChunk = 64;

struct AttentionParams {
  int64_t window = 128;  ///< positions p - window + 1 .. p, the current one included; 0: blocks
                         ///< alone, and no history is asked for
  double scale = 1.0;    ///< of the logits, head_dim^-1/2
  int64_t ratio = 0;     ///< of the compressed blocks; 0: none
  Numerics numerics = Numerics::kIdeal;
  bool lse = true;  ///< somebody reads AttentionResult::lse, which else may be undefined
};

/// Whether probabilities are rounded to BF16 before the value product, as matrix units want them
/// (docs/decisions/0012-probabilities.md).
inline bool rounds_probabilities(Numerics numerics) { return numerics != Numerics::kIdeal; }

struct AttentionResult {
  at::Tensor out;  ///< [tokens, heads, head_dim], q's dtype
  at::Tensor lse;  ///< [tokens, heads] FP32: log-sum-exp over window, blocks and sink
};

///   q          [tokens, heads, head_dim]
///   kv         [tokens, head_dim]   window latents of this step's tokens; for the kernels of a
///              GPU also packed as the ring's (cache/sm90_rows.h, rows_in_step_with), or undefined
///              where the ring holds them
///   history    ring of the latents before this step, at least window - 1 positions;
///              undefined rows: none
///   blocks     compressed rows [*, head_dim], all of c < floor((p + 1) / ratio) present;
///              ignored when ratio is 0
///   selection  [tokens, k] I32 ascending block numbers then -1; undefined: every visible block
///   sink       [heads] FP32 raw logits
AttentionResult sparse_attn(const at::Tensor& q,
                            const at::Tensor& kv,
                            const RingView& history,
                            const BlockView& blocks,
                            const at::Tensor& selection,
                            const at::Tensor& sink,
                            const Batch& batch,
                            const AttentionParams& params);

namespace reference {
AttentionResult sparse_attn(const at::Tensor& q,
                            const at::Tensor& kv,
                            const RingView& history,
                            const BlockView& blocks,
                            const at::Tensor& selection,
                            const at::Tensor& sink,
                            const Batch& batch,
                            const AttentionParams& params);
}  // namespace reference

}  // namespace hadal::ops
