// The memory of the caches (kv_cache.md): pages of compressed rows, state slots with
// rings, in the precision of the numerics; what the model reads and writes through KvAccess.
//
//   page   page_tokens positions of one sequence or of several that share them: for every layer
//          with ratio m its page_tokens / m compressed rows, for CSA layers as many index keys
//   slot   what a sequence needs besides, a function of its position: for every layer the window
//          ring, for compressed layers the rings of compressor inputs (FP32)
// `released` packs latents and index keys (ops/cache/kv_rows.h), `bf16` keeps BF16 and `ideal`
// FP32 rows. All memory is allocated at once. One thread at a time. docs/kv_cache.md
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "engine/row_memory.h"
#include "engine_core/runner.h"
#include "model/config.h"
#include "model/kv_access.h"
#include "ops/cache/batch.h"
#include "ops/op.h"

namespace hadal::engine {

/// The smallest multiple of lcm(ratios > 0) that is at least 256.
int64_t page_tokens_of(const model::ModelConfig& config);

struct KvCacheOptions {
  ops::Numerics numerics = ops::Numerics::kReleased;
  int64_t num_pages = 0;
  int64_t num_slots = 0;
  int64_t slack = 8;      ///< tokens a sequence can be taken back
  bool with_mtp = false;  ///< the MTP block, or each stage of the DSpark drafter, has a cache, too
  /// Window rings hold at least a page, as save_window() needs: for stores that keep all windows.
  bool whole_windows = false;
  at::Device device = at::kCPU;
  /// Memory is taken when it is first written: a cache may be as large as the longest context and
  /// costs what is used of it. A server wants what it will need at once.
  bool lazy = false;
};

class KvCache final : public engine_core::CacheMemory, public model::KvAccess {
 public:
  /// Errors: Error for counts below 1.
  KvCache(const model::ModelConfig& config, const KvCacheOptions& options);

  const KvCacheOptions& options() const { return options_; }
  int64_t page_tokens() const override { return page_tokens_; }
  int64_t num_pages() const override { return options_.num_pages; }
  int64_t num_slots() const override { return options_.num_slots; }
  /// Bytes a page has in all layers together: the closed form.
  int64_t page_bytes() const override;
  int64_t state_bytes() const override;
  /// Bytes that the tensors really hold; pages * page_bytes() + slots * state_bytes(), and on a GPU
  /// spare_bytes().
  int64_t allocated_bytes() const;
  /// Of the row behind all pages that every layer has on a GPU, for blocks that a padded step only
  /// has room for.
  int64_t spare_bytes() const;
  /// min(pos, n_win) window rows of every layer (with whole_windows also those of the unfinished
  /// page), and of every compressor the inputs of its unfinished block, with the block before it
  /// where blocks overlap.
  int64_t snapshot_bytes(int64_t pos) const override;

  void copy_page(int64_t from, int64_t to) override;
  void read_page(int64_t page, std::span<std::byte> out) const override;
  void write_page(int64_t page, std::span<const std::byte> in) override;
  void save_snapshot(int64_t slot, int64_t pos, std::span<std::byte> out) const override;
  void load_snapshot(int64_t slot, int64_t pos, std::span<const std::byte> in) override;

  /// page_tokens window rows of every layer and the rows of the compressors at the page's end; 0
  /// without whole_windows.
  int64_t window_bytes() const override;
  int64_t window_pages() const override;
  void save_window(int64_t slot, int64_t pos, std::span<std::byte> out) const override;
  void load_window(int64_t slot, int64_t pos, std::span<const std::byte> in) override;

  /// Whether the entries of pages are there already and are not written: while a state is rebuilt.
  void give_pages(bool given) { pages_are_given_ = given; }
  /// Tokens before a page border whose run makes the state behind it: L (n_win - 1), L the layers
  /// that have a cache (kv_cache_disk.md): each layer's windows are right n_win - 1 positions after
  /// those of the layer below. The drafter's stages, which depend on the layers alone, need n_win
  /// more.
  int64_t rebuild_tokens() const { return rebuild_tokens(0); }
  /// Those that a layer must see: (n_win - 1) for itself and for each one above it.
  int64_t rebuild_tokens(int64_t layer) const;

  /// The next forward pass works on these; returns its batch, whose ids() are the tokens. With
  /// `padded_end` on a GPU, its tables have the same shapes for every step of these lengths that
  /// ends there or before (StepPlaces::padded_end), and the same addresses while table_moves() is
  /// the same. Errors: Error for a slot used twice, too few pages, numbers out of range.
  ops::Batch begin(std::span<const engine_core::SequenceStep> steps, int64_t padded_end = 0);
  int64_t table_moves() const { return tables_.moves(); }

  /// Rows of block `block`'s windows: of slot slots[i] at position pos[i], both [n] I64 on the
  /// device; [n, head_dim] unpacked.
  at::Tensor read_window(int64_t block, const at::Tensor& slots, const at::Tensor& pos) const;

  ops::RingView ring(int64_t block, model::RingKind kind) override;
  ops::BlockView append_blocks(int64_t block,
                               model::BlockKind kind,
                               const at::Tensor& rows) override;
  void commit(int64_t block, model::RingKind kind, const at::Tensor& rows) override;
  BlockPlaces block_places(int64_t block, model::BlockKind kind) override;
  const ops::RingWrites* ring_places(int64_t block, model::RingKind kind) override;

 private:
  struct Ring {
    RowMemory memory;     // [slots * size]
    int64_t size = 0;     // positions
    int64_t overlap = 0;  // blocks before the unfinished one that a resumption needs; -1: a window
    int64_t ratio = 0;
    bool is_window() const { return overlap < 0; }
    /// Positions that a resumption at `pos` needs: the last so many, of window rings `window`.
    int64_t kept(int64_t pos, int64_t window) const;
  };
  struct Rows {
    RowMemory memory;  // [pages * page_blocks]
    int64_t page_blocks = 0;
    int64_t ratio = 0;
    int64_t page_bytes() const { return page_blocks * memory.row_bytes(); }
    std::vector<int64_t> of_page(int64_t page) const;
  };
  int64_t spare_rows() const { return options_.device.is_cpu() ? 0 : 1; }
  ops::BlockView block_view(const Rows& store) const;
  /// Window rows that a snapshot at `pos` holds.
  int64_t window_rows(int64_t pos) const;
  int64_t kept_bytes(int64_t pos, int64_t window) const;
  /// The rows of a ring that are kept at `pos`, in their order.
  static std::vector<int64_t> kept_rows(const Ring& ring,
                                        int64_t slot,
                                        int64_t pos,
                                        int64_t window);
  void save_kept(int64_t slot, int64_t pos, int64_t window, std::span<std::byte> out) const;
  void load_kept(int64_t slot, int64_t pos, int64_t window, std::span<const std::byte> in);

  model::ModelConfig config_;
  KvCacheOptions options_;
  int64_t page_tokens_;
  std::map<std::pair<int64_t, model::RingKind>, Ring> rings_;
  std::map<std::pair<int64_t, model::BlockKind>, Rows> blocks_;
  std::vector<int64_t> ratios_, ring_sizes_;  // of all layers, each once
  ops::PageTable pages_;                      // of all slots
  ops::TableMemory tables_;
  std::optional<ops::Batch> step_;
  bool pages_are_given_ = false;
};

}  // namespace hadal::engine
