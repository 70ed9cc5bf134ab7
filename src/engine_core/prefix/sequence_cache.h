// The caches of running sequences: which pages and which state slot each has, what it shares with
// others and with the prefix tree, and what is kept when it ends.
//
// It owns both pools and the tree and moves bytes through CacheMemory. The pages of the pool hold
// compressed rows or, as bytes, the states that are kept: both have one budget. The optional
// PrefixStore is asked when a sequence opens and told of every full page and every snapshot at a
// page's end that is new in memory; pages that it refuses are offered again when their prefix is
// used again. What it has is loaded piece by piece into pages of the sequence's own; until that
// ends the sequence stands where memory alone lets it begin, and may be closed at any time. One
// thread. Failures of the store are logged misses, never errors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "engine_core/prefix/page_pool.h"
#include "engine_core/prefix/prefix_tree.h"
#include "engine_core/prefix_store.h"
#include "engine_core/runner.h"

namespace hadal::engine_core {

/// What a running sequence holds. Positions [0, pos) are computed.
struct CachedSequence {
  int64_t slot = -1;           ///< -1: closed
  std::vector<int64_t> pages;  ///< in order of positions; may reach past pos
  int64_t pos = 0;
  bool use_tree = true;
  const CacheKey* key = nullptr;  ///< under which its states are kept; null: none
  /// While it loads: pages from that of `pos` on, known to memory or read from the store.
  std::vector<int64_t> loaded = {};

  int64_t num_pages() const { return static_cast<int64_t>(pages.size() + loaded.size()); }
};

class SequenceCache {
 public:
  struct Options {
    int64_t snapshot_interval = 0;  ///< tokens, a multiple of the page; 0: the page
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

  /// All outlive it; `store` may be null. The runner rebuilds states that the store does not keep.
  SequenceCache(CacheMemory& memory, Runner& runner, const Options& options, PrefixStore* store);

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

  /// A slot and the longest prefix in memory. False when no slot is free. Where the store may have
  /// more the sequence then loads(): load() goes on until it does no longer; `tokens` and `key`
  /// stay valid.
  bool open(std::span<const int64_t> tokens,
            const PrefixMatch& match,
            bool use_tree,
            CachedSequence& sequence,
            Opened& opened,
            const CacheKey* key = nullptr);
  bool loads(const CachedSequence& sequence) const { return loads_.contains(sequence.slot); }
  /// It loads, and another does it for it: load() would do nothing yet.
  bool follows(const CachedSequence& sequence) const;
  /// Reads at most `max_pages` pages more of `tokens`, those that were opened, or runs a page's
  /// tokens again where the store keeps no states. At the end `opened` tells what there was, and
  /// `sequence` stands behind it. Whether it ran the model.
  bool load(CachedSequence& sequence,
            std::span<const int64_t> tokens,
            int64_t max_pages,
            Opened& opened);
  /// Pages for positions up to `num_tokens`, all that will be written the sequence's own (a shared
  /// last page is copied); evicts as needed. False when memory is short; what it got stays.
  bool reserve(CachedSequence& sequence, int64_t num_tokens);
  /// A second sequence with the same tokens: pages shared, state copied. Nothing: no slot is free.
  std::optional<CachedSequence> fork(const CachedSequence& sequence);
  /// Makes the computed prefix of `tokens` known to others, with the state at its end where there
  /// is room for it.
  void publish(CachedSequence& sequence, std::span<const int64_t> tokens, StateKind kind);
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
  /// Pages and slots that somebody holds.
  int64_t bytes_in_use() const;
  /// Pages that a state at `pos` takes.
  int64_t snapshot_pages(int64_t pos) const;
  /// What a page takes beside its bytes, in the books.
  static int64_t book_bytes(int64_t page_tokens);

  /// The pools' counts are those of `open` (all open sequences) and the tree; the tree is whole.
  void check_integrity(std::span<const CachedSequence* const> open) const;

 private:
  std::optional<int64_t> allocate();
  std::span<std::byte> state_bytes(int64_t pos);
  std::span<std::byte> scratch_page(size_t number);
  std::span<const std::byte> keep_state(const CachedSequence& sequence,
                                        std::span<const int64_t> prefix,
                                        StateKind kind,
                                        bool save);
  bool own_last_page(CachedSequence& sequence);
  void take_match(const PrefixMatch& match, CachedSequence& sequence);
  void begin_load(std::span<const int64_t> tokens,
                  const PrefixMatch& match,
                  CachedSequence& sequence,
                  Opened& opened);
  bool take_pages(CachedSequence& sequence, const std::vector<std::vector<std::byte>>& pages);
  bool accept(const CachedSequence& sequence, int64_t size, const StoredPrefix& stored) const;
  bool make_state(const CachedSequence& sequence, std::span<const int64_t> tokens);
  void finish_load(CachedSequence& sequence, std::span<const int64_t> tokens, Opened& opened);
  void end_load(CachedSequence& sequence);
  std::pair<int64_t, uint64_t> find_leader(std::span<const int64_t> tokens,
                                           int64_t num_known) const;
  bool has_state(const StoredPrefix& stored) const;
  void store_new(const CachedSequence& sequence,
                 std::span<const int64_t> tokens,
                 std::span<const std::byte> snapshot);

  /// A prefix on its way from the store.
  struct Load {
    std::span<const int64_t> tokens;
    uint64_t id = 0;
    std::unique_ptr<PrefixLoad> reader = {};
    /// Without a reader: slot and id of the load that brings this one's next page, too.
    std::pair<int64_t, uint64_t> leader = {};
    std::optional<StoredPrefix> found = {};  ///< all is read; the state is missing
    int64_t rebuilt = 0;                     ///< the state's tokens were run up to here
  };

  CacheMemory& memory_;
  Runner& runner_;
  PrefixStore* store_;
  int64_t page_tokens_, snapshot_interval_;
  bool keeps_windows_;  ///< the store wants the window of every page
  PagePool pages_;
  SlotPool slots_;
  PrefixTree tree_;
  std::map<int64_t, Load> loads_;  ///< by slot
  uint64_t last_load_ = 0;
  std::vector<std::byte> scratch_;  ///< a state on its way
  std::vector<uint8_t> unsaved_;    ///< [num_pages] not from the store and not taken by it yet
  Counters counters_;
};

}  // namespace hadal::engine_core
