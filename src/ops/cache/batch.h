// Where the tokens of one step sit: packed rows of several sequences, each a run of consecutive
// positions.
//
// Training passes whole samples (start 0); a service passes any run at any position (model.md 15).
// The compressed blocks that a step completes follow from it alone, so they are planned here once
// for every layer.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/cache/kv_rows.h"

namespace hadal::ops {

/// The compressed blocks of ratio m that a step completes: for each sequence the blocks
/// [floor(start / m), floor((start + length) / m)), in order.
struct BlockPlan {
  int64_t ratio = 0;
  std::vector<int64_t> cu_blocks;    ///< [num_seqs + 1] running count of new blocks
  std::vector<int64_t> first_block;  ///< [num_seqs] number of each sequence's first new block
  at::Tensor pos;  ///< [num_blocks] I64, position m * c of each block's first token
  /// [num_blocks * ratio]: row in the packed step of each position of each block; for a position
  /// from before the step -1 - position.
  std::vector<int64_t> rows;
  at::Tensor
      device_rows;  ///< the same on the batch's device; undefined unless every row lies in the step
  /// [num_blocks] I64: num_seqs + the number of the preceding new block of the same sequence, or
  /// for a sequence's first new block the number of the sequence.
  at::Tensor previous;
  at::Tensor device_cu_blocks;  ///< [num_seqs + 1] I32
  int64_t max_pos = 0;          ///< largest entry of pos, 0 when there is none
  int64_t num_blocks() const { return cu_blocks.back(); }
};

class Batch {
 public:
  /// `lengths[s]` >= 1 tokens of sequence s, the first at position `starts[s]` >= 0. Index tensors
  /// go to `device`.
  Batch(std::vector<int64_t> lengths, std::vector<int64_t> starts, at::Device device);

  int64_t num_seqs() const { return static_cast<int64_t>(starts_.size()); }
  int64_t num_tokens() const { return cu_seqlens_.back(); }
  int64_t begin(int64_t seq) const { return cu_seqlens_[static_cast<size_t>(seq)]; }
  int64_t end(int64_t seq) const { return cu_seqlens_[static_cast<size_t>(seq) + 1]; }
  int64_t length(int64_t seq) const { return end(seq) - begin(seq); }
  int64_t start(int64_t seq) const { return starts_[static_cast<size_t>(seq)]; }
  /// Largest position + 1 over all sequences.
  int64_t max_end_pos() const { return max_end_pos_; }
  const std::vector<int64_t>& cu_seqlens() const { return cu_seqlens_; }
  const std::vector<int64_t>& starts() const { return starts_; }
  const std::vector<int64_t>& host_pos() const { return host_pos_; }

  /// [num_tokens] I64: absolute position and sequence of every token.
  const at::Tensor& pos() const { return pos_; }
  const at::Tensor& seq() const { return seq_; }

  const BlockPlan& blocks(int64_t ratio) const;

  /// True when every sequence starts at position 0 (training, one-shot prefill).
  bool whole() const;
  /// [num_seqs + 1] I32 on the device.
  const at::Tensor& device_cu_seqlens() const;
  /// Runs of at most `size` tokens, none across sequences: [n, 4] I32 (packed row, tokens,
  /// position, sequence).
  const at::Tensor& token_tiles(int64_t size) const;
  /// Runs of at most `size` keys, none across sequences: every token, then (ratio > 0) every block
  /// of the step. [n, 4] I32 (1 for blocks, first position or block, its row, sequence).
  const at::Tensor& key_tiles(int64_t size, int64_t ratio) const;

 private:
  std::vector<int64_t> cu_seqlens_, starts_, host_pos_;
  int64_t max_end_pos_ = 0;
  at::Tensor pos_, seq_;
  // Plans are made on first use and shared by all layers.
  mutable std::map<int64_t, BlockPlan> plans_;
  mutable at::Tensor device_cu_seqlens_;
  mutable std::map<int64_t, at::Tensor> token_tiles_;
  mutable std::map<std::pair<int64_t, int64_t>, at::Tensor> key_tiles_;
};

/// Rows that belong to positions before this step, addressed by position: row(seq, pos) =
/// first_row[seq] + pos mod ring. An undefined tensor means no history (every start is 0).
struct RingView {
  at::Tensor rows;                 ///< [num_rows, width], or packed bytes
  std::vector<int64_t> first_row;  ///< [num_seqs]
  int64_t ring = 1;
  RowFormat format = {};
};

/// Compressed rows addressed by block number: row(seq, c) = page_start[seq][c / page_blocks] + c
/// mod page_blocks. Contiguous storage is the case of one page a sequence.
struct BlockView {
  at::Tensor rows;  ///< [num_rows, width], or packed bytes
  std::vector<std::vector<int64_t>> page_start;
  int64_t page_blocks = INT64_MAX;
  RowFormat format = {};
  int64_t width() const { return format.packed() ? format.width : rows.size(1); }
  int64_t row(int64_t seq, int64_t block) const {
    return page_start[static_cast<size_t>(seq)][static_cast<size_t>(block / page_blocks)] +
           block % page_blocks;
  }
  /// Rows of the blocks [from, to) of a sequence, [to - from, width], unpacked;
  /// differentiable where they are dense.
  at::Tensor gather(int64_t seq, int64_t from, int64_t to) const;
};

}  // namespace hadal::ops
