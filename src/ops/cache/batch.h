// Where the tokens of one step sit: packed rows of several sequences, each a run of consecutive
// positions.
//
// Training passes whole samples (start 0); a service passes any run at any position (model.md 15).
// All that follows from it alone (which compressed blocks the step completes, which rows of the
// caches it writes) is planned once for every layer and lives as tables on the device: at fixed
// addresses where the caller keeps their memory. Copies of a batch share its plan.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/cache/cache_views.h"
#include "ops/cache/page_table.h"
#include "ops/cache/table_memory.h"

namespace hadal::ops {

/// The compressed blocks of ratio m that a step completes: for each sequence the blocks
/// [floor(start / m), floor((start + length) / m)), in order.
struct BlockPlan {
  int64_t ratio = 0;
  std::vector<int64_t> cu_blocks;    ///< [num_seqs + 1] running count of new blocks
  int64_t num_absent = 0;            ///< entries of a padded plan that stand for no block
  std::vector<int64_t> first_block;  ///< [num_seqs] number of each sequence's first new block
  int64_t max_pos = 0;               ///< largest entry of pos, 0 when there is none
  bool inside = true;                ///< every token of every block lies in the step

  at::Tensor pos;  ///< [num_blocks] I64, position m * c of each block's first token; absent: 0
  at::Tensor seq;  ///< [num_blocks] I64; absent: -1
  /// [num_blocks * ratio] I64: row in the packed step of each position of each block; for a
  /// position from before the step -1 - position.
  at::Tensor rows;
  /// [num_blocks] I64: num_seqs + the number of the preceding new block of the same sequence, or
  /// for a sequence's first new block the number of the sequence.
  at::Tensor previous;
  at::Tensor device_cu_blocks;  ///< [num_seqs + 1] I32
  at::Tensor numbers;           ///< [num_seqs] I32: 0, 1, ...
  /// [num_blocks] I64: the cache's row of each block; undefined without pages. Absent: the row
  /// behind all pages, which nobody reads.
  at::Tensor cache_rows;
  int64_t num_blocks() const { return cu_blocks.back() + num_absent; }
};

/// What a step leaves in a ring: its row from[i] becomes the ring's row to[i]; I64 [rows] each.
/// Positions that the step itself overwrites are left out.
struct RingWrites {
  at::Tensor from, to;
};

/// Where the sequences of a step have their places in the caches.
struct StepPlaces {
  std::vector<int64_t> slots = {};       ///< [num_seqs]; empty: 0, 1, ...
  const PageTable* pages = nullptr;      ///< of all slots; null: no blocks are kept in pages
  int64_t page_tokens = 0;               ///< positions of a page, a multiple of every ratio
  TableMemory* memory = nullptr;         ///< of the tables, for one step at a time; null: new ones
  std::span<const int64_t> ratios = {};  ///< planned at once; others when they are asked for
  std::span<const int64_t> ring_sizes = {};  ///< likewise
  std::span<const int64_t> ids = {};         ///< of the step's tokens; empty: they are no table
  /// > 0: every table has the size that it has for any step of the same lengths which ends at or
  /// before this position, so that what was recorded for one step serves them all. Blocks that the
  /// step does not complete are absent; max_end_pos() is this. For the kernels of a GPU.
  int64_t padded_end = 0;
};

class Batch {
 public:
  /// `lengths[s]` >= 1 tokens of sequence s, the first at position `starts[s]` >= 0. Tables go to
  /// `device`. Errors: Error for runs that cannot be.
  Batch(std::vector<int64_t> lengths,
        std::vector<int64_t> starts,
        at::Device device,
        const StepPlaces& places = {});

  int64_t num_seqs() const { return std::ssize(plan_->starts); }
  int64_t num_tokens() const { return plan_->cu_seqlens.back(); }
  int64_t begin(int64_t seq) const { return plan_->cu_seqlens[static_cast<size_t>(seq)]; }
  int64_t end(int64_t seq) const { return plan_->cu_seqlens[static_cast<size_t>(seq) + 1]; }
  int64_t max_length() const;
  int64_t length(int64_t seq) const { return end(seq) - begin(seq); }
  int64_t start(int64_t seq) const { return plan_->starts[static_cast<size_t>(seq)]; }
  /// Largest position + 1 over all sequences, or what the step is padded to.
  int64_t max_end_pos() const { return plan_->max_end_pos; }
  const std::vector<int64_t>& cu_seqlens() const { return plan_->cu_seqlens; }
  const std::vector<int64_t>& starts() const { return plan_->starts; }
  const std::vector<int64_t>& host_pos() const { return plan_->host_pos; }

  /// [num_tokens] I64: absolute position and sequence of every token.
  const at::Tensor& pos() const { return plan_->pos; }
  const at::Tensor& seq() const { return plan_->seq; }
  /// [num_seqs] I32: the slot of every sequence.
  const at::Tensor& slots() const { return plan_->slots; }
  /// [num_tokens] I32: that of every token's sequence.
  const at::Tensor& token_slots() const { return plan_->token_slots; }
  /// [num_tokens] I64; undefined where StepPlaces had none.
  const at::Tensor& ids() const { return plan_->ids; }

  const BlockPlan& blocks(int64_t ratio) const;
  /// [num_blocks] I64 on the CPU: row in the packed step of the last token of each block that the
  /// step completes. Not of padded plans.
  const at::Tensor& block_places(int64_t ratio) const;
  /// [num_tokens] I32: blocks of ratio m that a token sees, floor((position + 1) / m).
  const at::Tensor& visible(int64_t ratio) const;
  /// For rings of `size` positions.
  const RingWrites& ring_writes(int64_t size) const;

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
  struct Plan {
    std::vector<int64_t> cu_seqlens, starts, host_pos, host_slots;
    int64_t max_end_pos = 0;
    bool padded = false;
    at::Device device = at::kCPU;
    const PageTable* pages = nullptr;
    int64_t page_tokens = 0;
    at::Tensor pos, seq, slots, token_slots, ids;
    // Made on first use and shared by all layers.
    std::map<int64_t, BlockPlan> blocks;
    std::map<int64_t, RingWrites> ring_writes;
    std::map<int64_t, at::Tensor> visible, block_places;
    at::Tensor device_cu_seqlens;
    std::map<int64_t, at::Tensor> token_tiles;
    std::map<std::pair<int64_t, int64_t>, at::Tensor> key_tiles;
  };
  const BlockPlan& plan_blocks(int64_t ratio, TableMemory* memory) const;
  const RingWrites& plan_ring_writes(int64_t size, TableMemory* memory) const;
  const at::Tensor& plan_visible(int64_t ratio, TableMemory* memory) const;

  std::shared_ptr<Plan> plan_;
};

/// Rows of a step that nothing came before, in the order of its plan, as a view. Errors: Error
/// where a sequence continues an earlier step.
BlockView step_blocks(const at::Tensor& rows, const Batch& batch, int64_t ratio);

}  // namespace hadal::ops
