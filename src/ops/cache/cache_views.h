// What ops read of a cache: rows that were there before the step, found through the step's tables.
//
// A view is made of tensors that outlive the step, so a layer makes one in no time and a kernel
// finds everything where it was the step before.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/cache/kv_rows.h"
#include "ops/cache/row_tables.h"

namespace hadal::ops {

/// Rows that belong to positions before this step: row(seq, pos) = slots[seq] * ring + pos mod
/// ring. An undefined tensor means no history (every start is 0).
struct RingView {
  at::Tensor rows;   ///< [num_rows, width], or packed bytes
  at::Tensor slots;  ///< [num_seqs] I32, on the rows' device
  int64_t ring = 1;
  RowFormat format = {};
  /// The step's own rows are in it already, over ones that no query of the step needs.
  bool holds_step = false;

  static RingView of_slots(const at::Tensor& rows, const std::vector<int64_t>& slots, int64_t ring);

  RingRows table() const { return {.slots = slots.const_data_ptr<int32_t>(), .size = ring}; }
  /// [to - from] I64: the rows of positions [from, to) of a sequence.
  at::Tensor numbers(int64_t seq, int64_t from, int64_t to) const;
  /// [n] I64: the rows of positions pos [n] of the sequences seq [n], both I64.
  at::Tensor numbers(const at::Tensor& seq, const at::Tensor& pos) const;
  /// Those rows, [to - from, width], unpacked.
  at::Tensor gather(int64_t seq, int64_t from, int64_t to) const;
};

/// Compressed rows of every sequence, by block number (row_tables.h).
struct BlockView {
  at::Tensor rows;   ///< [num_rows, width], or packed bytes
  at::Tensor slots;  ///< [num_seqs] I32 lines of `pages`
  at::Tensor pages;  ///< [*, pages of a sequence] I32; the last dimension is contiguous
  int64_t page_blocks = INT64_MAX;
  int64_t page_rows = 1;
  RowFormat format = {};
  /// The rows are those of this step's own blocks, in the order of its plan.
  bool of_step = false;

  /// Sequence s has its blocks one after the other from row first_rows[s] on.
  static BlockView consecutive(const at::Tensor& rows, const std::vector<int64_t>& first_rows);
  /// Block c of sequence s is row pages[s][c / page_blocks] * page_blocks + c mod page_blocks.
  static BlockView paged(const at::Tensor& rows,
                         const std::vector<std::vector<int64_t>>& pages,
                         int64_t page_blocks);

  /// [num_seqs] the row of each sequence's block 0. Error where blocks lie in pages.
  std::vector<int64_t> first_rows() const;
  int64_t width() const { return format.packed() ? format.width : rows.size(1); }
  BlockRows table() const {
    return {.slots = slots.const_data_ptr<int32_t>(),
            .pages = pages.const_data_ptr<int32_t>(),
            .stride = pages.stride(0),
            .page_blocks = page_blocks,
            .page_rows = page_rows};
  }
  /// Rows of the blocks [from, to) of a sequence, [to - from, width], unpacked;
  /// differentiable where they are dense.
  at::Tensor gather(int64_t seq, int64_t from, int64_t to) const;
};

}  // namespace hadal::ops
