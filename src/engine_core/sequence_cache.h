// The caches of running sequences: which pages and which state slot each has, what it shares with
// others and with the prefix tree, and what is kept when it ends.
//
// It owns both pools and the tree and moves bytes through CacheMemory; the optional PrefixStore is
// asked when a sequence opens and told of every full page and every snapshot at a page's end that
// is new in memory. One thread. Failures of the store are logged misses, never errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "engine_core/page_pool.h"
#include "engine_core/prefix_store.h"
#include "engine_core/prefix_tree.h"
#include "engine_core/runner.h"

namespace hadal::engine {

/// What a running sequence holds. Positions [0, pos) are computed.
struct CachedSequence {
  int64_t slot = -1;           ///< -1: closed
  std::vector<int64_t> pages;  ///< in order of positions; may reach past pos
  int64_t pos = 0;
  bool use_tree = true;
};

class SequenceCache {
 public:
  struct Options {
    int64_t snapshot_interval = 0;  ///< tokens, a multiple of the page; 0: the page
    int64_t snapshot_budget_bytes = int64_t{1} << 30;
  };
  /// What opening found.
  struct Opened {
    int64_t cached_tokens = 0;  ///< from memory and disk
    int64_t disk_tokens = 0;    ///< of them from disk
    const char* miss = "new";
  };
  struct Counters {
    int64_t disk_hits = 0, disk_misses = 0, disk_errors = 0;
  };

  /// `memory` and `store` (may be null) outlive it.
  SequenceCache(CacheMemory& memory, const Options& options, PrefixStore* store);

  int64_t page_tokens() const { return page_tokens_; }
  int64_t snapshot_interval() const { return snapshot_interval_; }
  /// Where the next state after `pos` is kept: a step must not go past it.
  int64_t next_kept(int64_t pos) const;
  int64_t num_pages_for(int64_t num_tokens) const;

  /// What memory knows of all but the last token, at once to be given to open().
  PrefixMatch match(std::span<const int64_t> tokens, bool use_tree);
  /// Pages that a sequence of `num_tokens` tokens opened with `match` takes out of num_available().
  int64_t pages_taken(const PrefixMatch& match, int64_t num_tokens) const;
  /// Free pages and those that evicting would free.
  int64_t num_available() const { return pages_.num_free() + pages_.num_cached(); }

  /// A slot and the longest known prefix. False when no slot is free.
  bool open(std::span<const int64_t> tokens,
            const PrefixMatch& match,
            bool use_tree,
            CachedSequence& sequence,
            Opened& opened);
  /// Pages for positions up to `num_tokens`, all that will be written the sequence's own (a shared
  /// last page is copied); evicts as needed. False when memory is short; what it got stays.
  bool reserve(CachedSequence& sequence, int64_t num_tokens);
  /// A second sequence with the same tokens: pages shared, state copied. Nothing: no slot is free.
  std::optional<CachedSequence> fork(const CachedSequence& sequence);
  /// Makes the computed prefix of `tokens` known to others, with the state at its end.
  void publish(CachedSequence& sequence, std::span<const int64_t> tokens);
  /// At a page's end, for stores that keep all windows: the window of the page just computed.
  void store_window(const CachedSequence& sequence, std::span<const int64_t> tokens);
  /// Gives back pages and slot.
  void close(CachedSequence& sequence);
  /// Forgets all prefixes in memory.
  void clear_tree() { tree_.clear(); }

  const PagePool& pages() const { return pages_; }
  const SlotPool& slots() const { return slots_; }
  const PrefixTree& tree() const { return tree_; }
  const Counters& counters() const { return counters_; }
  /// Pages, slots and snapshots that somebody holds.
  int64_t bytes_in_use() const;

  /// The pools' counts are those of `open` (all open sequences) and the tree; the tree is whole.
  void check_integrity(std::span<const CachedSequence* const> open) const;

 private:
  std::optional<int64_t> allocate();
  bool own_last_page(CachedSequence& sequence);
  bool load_stored(std::span<const int64_t> tokens,
                   const PrefixMatch& match,
                   CachedSequence& sequence,
                   Opened& opened);
  bool usable(const StoredPrefix& stored, int64_t from_page, int64_t max_pos) const;
  bool has_state(const StoredPrefix& stored) const;
  void restore_state(const CachedSequence& sequence,
                     std::span<const int64_t> tokens,
                     StoredPrefix& stored);
  void store_new(const CachedSequence& sequence,
                 std::span<const int64_t> tokens,
                 int64_t first_new,
                 std::span<const std::byte> snapshot);

  CacheMemory& memory_;
  PrefixStore* store_;
  int64_t page_tokens_, snapshot_interval_;
  bool keeps_windows_;  ///< the store wants the window of every page
  PagePool pages_;
  SlotPool slots_;
  PrefixTree tree_;
  Counters counters_;
};

}  // namespace hadal::engine
