// The reference cache: plain tensors for a fixed number of sequences, no paging, values as the
// model computes them.
//
// A slot holds one sequence: rings of every layer and all its compressed rows. begin() says which
// slots the next forward pass works on; the pass appends and commits; advance() accounts for it.
// Rollback to any position not older than `slack` tokens is exact, because rings are addressed by
// position and that much longer than the model needs.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/config.h"
#include "model/kv_access.h"
#include "ops/cache/batch.h"

namespace hadal::model {

class ContiguousKv : public KvAccess {
 public:
  /// Room for `slots` sequences of at most max_tokens tokens; storage grows as positions do.
  /// Activations have `dtype` (BF16, or FP32/FP64 in `ideal`). slack: tokens that a rollback may
  /// take back (at least the longest draft).
  ContiguousKv(const ModelConfig& config,
               int64_t slots,
               int64_t max_tokens,
               at::ScalarType dtype,
               at::Device device,
               int64_t slack = 8);

  /// Tokens stored of a slot.
  int64_t length(int64_t slot) const { return lengths_.at(static_cast<size_t>(slot)); }
  /// Empties a slot for another sequence.
  void reset(int64_t slot);
  /// The shortest length that rollback() may still return to: rings keep `slack` positions more
  /// than the model needs, counted from the furthest position ever written.
  int64_t rollback_floor(int64_t slot) const;
  /// Forgets all tokens from position `length` on. Throws Error below rollback_floor().
  void rollback(int64_t slot, int64_t length);

  /// The next pass runs `lengths[i]` tokens of slot slots[i]; returns the batch for it.
  ops::Batch begin(const std::vector<int64_t>& slots, const std::vector<int64_t>& lengths);
  /// The pass is done: its tokens count.
  void advance();

  ops::RingView ring(int64_t block, RingKind kind) override;
  ops::BlockView append_blocks(int64_t block, BlockKind kind, const at::Tensor& rows) override;
  void commit(int64_t block, RingKind kind, const at::Tensor& rows) override;

 private:
  struct Ring {
    at::Tensor rows;  // [slots * size, width]
    int64_t size = 0;
  };
  struct Rows {
    at::Tensor rows;  // [slots, capacity, width]
    int64_t capacity = 0;
  };

  void grow(Rows& store, int64_t needed);

  ModelConfig config_;
  int64_t num_slots_, max_tokens_, slack_;
  at::Device device_;
  std::vector<int64_t> lengths_, furthest_;
  std::map<std::pair<int64_t, RingKind>, Ring> rings_;
  std::map<std::pair<int64_t, BlockKind>, Rows> blocks_;
  std::vector<int64_t> active_, active_lengths_;
  at::Tensor lines_;  // [slots, 1] I32: each slot's number, which is its one page
  std::optional<ops::Batch> step_;
};

}  // namespace hadal::model
