// What attention asks of a cache: rows from before this step, room for the blocks it completes, and
// a commit.
//
// The model calls, per layer and in this order: state() and append_blocks() of the compressors,
// window(), and last commit() of everything it computed, when no query of the step needs older rows
// any more (model.md 15).
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "ops/cache/batch.h"

namespace hadal::model {

/// Position-addressed rings of one layer.
enum class RingKind { kWindow, kKv, kScore, kIndexKv, kIndexScore };
/// Append-only rows of one layer, by block number.
enum class BlockKind { kCompressed, kIndexKeys };

class KvAccess {
 public:
  virtual ~KvAccess() = default;

  /// Rows before this step's positions, for every sequence of the batch.
  virtual ops::RingView ring(int64_t block, RingKind kind) = 0;
  /// Stores the rows of batch.blocks(ratio) and returns the view of all blocks of every sequence.
  virtual ops::BlockView append_blocks(int64_t block, BlockKind kind, const at::Tensor& rows) = 0;
  /// Stores this step's rows [tokens, width] into the ring; packed rows as they are.
  virtual void commit(int64_t block, RingKind kind, const at::Tensor& rows) = 0;

  // For kernels that make rows where they will lie (ops/cache/sm90_rows.h), in place of what stands
  // above. Caches that keep rows otherwise say no.

  /// Where the rows of batch.blocks(ratio) go.
  struct BlockPlaces {
    ops::BlockView view;  ///< of all blocks; undefined rows: append_blocks() takes them
    at::Tensor numbers;  ///< [num_blocks] I64 of the view's rows; undefined: they are there already
  };
  virtual BlockPlaces block_places(int64_t /*block*/, BlockKind /*kind*/) { return {}; }
  /// Which rows of the step go where in a ring that the caller may write, after all that reads its
  /// older rows; null: commit() takes them.
  virtual const ops::RingWrites* ring_places(int64_t /*block*/, RingKind /*kind*/) {
    return nullptr;
  }
};

}  // namespace hadal::model
