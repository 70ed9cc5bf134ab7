// What the engine asks of a store of prefixes that outlives the process: pages and the bytes to
// resume behind them, found again by the token ids alone.
//
// How the window rows are kept is the store's policy (docs/kv_cache_disk.md):
//   full      the window rows of every page are stored beside it: any page boundary resumes
//   periodic  a snapshot every `period` tokens: the last one resumes, the tail is recomputed
//   zero      neither: the caller recomputes the L(n_win - 1) tokens before the boundary
// The bytes of pages, snapshots and windows are the caller's; a store only keeps them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace hadal::engine_core {

enum class WindowPolicy : uint8_t { kFull, kPeriodic, kZero };

struct StoredPrefix {
  int64_t pos = 0;                            ///< tokens it covers, a page boundary
  std::vector<std::vector<std::byte>> pages;  ///< from `from_page` up to `pos`
  /// At `pos`. Empty where none is kept: Runner::rebuild() makes the state again where it can.
  std::vector<std::byte> snapshot;
  /// kFull only: what save_window() was given for the last pages before `pos`, in their order, as
  /// many as the window reaches back.
  std::vector<std::vector<std::byte>> windows = {};
};

/// A prefix being read, piece by piece; ends before its store does. One thread.
class PrefixLoad {
 public:
  virtual ~PrefixLoad() = default;
  /// Goes on for at most `max_pages` pages or as much other work; appends those it read to `pages`,
  /// in order. False: that was the last piece.
  virtual bool advance(int64_t max_pages, std::vector<std::vector<std::byte>>& pages) = 0;
  /// After the last piece: what was found, without `pages`, of which there may have been more than
  /// `pos` covers. Absent when nothing is stored that the caller lacks.
  virtual std::optional<StoredPrefix> take_result() = 0;
};

class PrefixStore {
 public:
  virtual ~PrefixStore() = default;
  virtual int64_t page_tokens() const = 0;
  /// From now on pages of other weights, say, are stored and found: `identity` names all that must
  /// be equal for bytes to mean the same. Not while a load is under way.
  virtual void set_identity(const std::string& identity) = 0;
  /// The longest stored prefix of `tokens`, at most `max_pos` tokens; pages from `from_page` on.
  /// `pos` may lie before page `from_page` (then without pages): what resumes there is stored
  /// although its pages are the caller's.
  virtual std::unique_ptr<PrefixLoad> begin_load(std::span<const int64_t> tokens,
                                                 int64_t from_page,
                                                 int64_t max_pos) = 0;
  /// The same in one piece.
  std::optional<StoredPrefix> load(std::span<const int64_t> tokens,
                                   int64_t from_page,
                                   int64_t max_pos);
  /// `prefix_tokens` end where the page ends. False: not now; it may be offered again.
  virtual bool save_page(std::span<const int64_t> prefix_tokens,
                         std::span<const std::byte> page) = 0;
  /// Kept only where wants_snapshot(prefix_tokens.size()).
  virtual void save_snapshot(std::span<const int64_t> prefix_tokens,
                             std::span<const std::byte> snapshot) = 0;

  /// The caller used this prefix without a load, from memory: it stays young here too.
  virtual void touch([[maybe_unused]] std::span<const int64_t> tokens) {}

  /// What it holds, queued writes included.
  virtual int64_t stored_bytes() const { return 0; }

  virtual WindowPolicy policy() const { return WindowPolicy::kPeriodic; }
  /// Whether a snapshot at this position would be kept; asks before the caller gathers its bytes.
  virtual bool wants_snapshot([[maybe_unused]] int64_t pos) const { return true; }
  /// Under kFull: the window rows of the last page's tokens, and what else a resumption at its end
  /// needs. Other policies ignore it.
  virtual void save_window([[maybe_unused]] std::span<const int64_t> prefix_tokens,
                           [[maybe_unused]] std::span<const std::byte> window) {}
};

}  // namespace hadal::engine_core
