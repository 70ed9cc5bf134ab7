// Gated pooling of m tokens into one compressed entry (model.md 7), at any position and chunking
// (model.md 15).
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/cache/batch.h"
#include "ops/op.h"

namespace hadal::ops {

struct Compressed {
  at::Tensor pooled;  ///< [num_blocks, d] FP32: per channel softmax-weighted sums, before norm and
                      ///< rotation; of the Hopper kernel rounded to BF16
  /// [tokens, o d] FP32: gate + ape, what the state keeps beside kv; where it was asked for.
  at::Tensor score;
};

/// Pools every block that this step completes (batch.blocks(ratio), in that order).
///   kv, gate  [tokens, o d] FP32   o = 2 for ratio 4 (previous block's half first), else 1
///   ape       [ratio, o d]  FP32   added to the gate at position mod ratio, never to kv
///   kv_history, score_history      rings of the rows before this step (score includes ape), of
///                                  length >= o * ratio - 1; undefined rows when every sequence
///                                  starts at 0
///   numerics                       on a GPU the Hopper kernel serves all but `ideal`
Compressed compress(const at::Tensor& kv,
                    const at::Tensor& gate,
                    const at::Tensor& ape,
                    const RingView& kv_history,
                    const RingView& score_history,
                    const Batch& batch,
                    int64_t ratio,
                    Numerics numerics = Numerics::kIdeal,
                    bool scores = true);

/// The same on the CPU for samples of which a pass has a part; of the pooled rows alone, and with
/// gradients of everything.
///   kv_history, gate_history  rings of 128 rows before the pass, of kv and of the gate itself; a
///                             ratio must divide 128
/// The gradient of ape is a sum by the tree of sum_tree.h over the blocks, each where its last
/// token stands in the pass; so it is in compress() on the CPU.
at::Tensor compress_part(const at::Tensor& kv,
                         const at::Tensor& gate,
                         const at::Tensor& ape,
                         const RingView& kv_history,
                         const RingView& gate_history,
                         const Batch& batch,
                         int64_t ratio);

/// Whether keep_rows_on_sm90 keeps rows in such rings.
bool serves_keep_rows_sm90(const at::Tensor& kv,
                           const RingView& kv_history,
                           const RingView& score_history,
                           Numerics numerics);
/// Writes kv and gate + ape of this step's tokens into both rings, which compress() must have read
/// by then.
void keep_rows_on_sm90(const at::Tensor& kv,
                       const at::Tensor& gate,
                       const at::Tensor& ape,
                       const RingView& kv_history,
                       const RingView& score_history,
                       const Batch& batch,
                       int64_t ratio,
                       const RingWrites& writes);

namespace reference {
Compressed compress(const at::Tensor& kv,
                    const at::Tensor& gate,
                    const at::Tensor& ape,
                    const RingView& kv_history,
                    const RingView& score_history,
                    const Batch& batch,
                    int64_t ratio);
}  // namespace reference

}  // namespace hadal::ops
