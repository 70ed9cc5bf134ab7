// What the scheduler asks of a prefix cache beyond memory (the disk): full pages and snapshots, by
// the tokens that led to them. Called from the engine's thread only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

namespace hadal::engine {

struct StoredPrefix {
  int64_t pos = 0;  ///< the snapshot's: tokens that need not be computed
  /// Pages `from_page` to pos / page_tokens - 1, page_bytes() each.
  std::vector<std::vector<std::byte>> pages;
  /// Empty: not kept; CacheMemory::rebuild() makes the state again where it can.
  std::vector<std::byte> snapshot;
};

class PrefixStore {
 public:
  virtual ~PrefixStore() = default;
  /// The longest stored prefix of `tokens` that ends at or before `max_pos`. The caller has the
  /// pages before `from_page`.
  virtual std::optional<StoredPrefix> load(std::span<const int64_t> tokens,
                                           int64_t from_page,
                                           int64_t max_pos) = 0;
  /// Returns at once: what it keeps it copies.
  virtual void save_page(std::span<const int64_t> prefix_tokens_through_page_end,
                         std::span<const std::byte> page) = 0;
  virtual void save_snapshot(std::span<const int64_t> prefix_tokens,
                             std::span<const std::byte> snapshot) = 0;
};

}  // namespace hadal::engine
