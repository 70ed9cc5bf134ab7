// Which records the disk store holds and which of them go first when it is over its budget.
//
// Order of eviction: the least recently used; of those used at the same time (the pages of one
// prefix are) the one furthest from the beginning, since without an earlier page the later ones are
// out of reach; then the larger. "Time" counts uses: it survives restarts and clock changes.
// Not thread-safe.
#pragma once

#include <algorithm>
#include <cstdint>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine_core/disk/disk_record.h"

namespace hadal::engine_core {

class RecencyIndex {
 public:
  enum class State : uint8_t { kAbsent, kQueued, kStored };

  State state(const std::string& key) const;
  /// A new key, which waits in the queue until mark_stored(). It counts as used when `like` was
  /// (an earlier page of its prefix, if held), else now: a prefix goes as a whole, from its end.
  void insert(const std::string& key, int64_t pos, int64_t bytes, const std::string& like = {});
  /// A key as found on disk.
  void restore(const std::string& key, const IndexEntry& entry);
  void mark_stored(const std::string& key);
  /// A new time of use.
  uint64_t begin_use() { return ++now_; }
  void advance_to(uint64_t now) { now_ = std::max(now_, now); }
  /// Used at `time`, which begin_use() gave; keys of one time count as used together.
  void touch(const std::string& key, uint64_t time);
  void touch(const std::string& key) { touch(key, now_); }
  void erase(const std::string& key);
  void clear();

  const IndexEntry& at(const std::string& key) const { return nodes_.at(key).entry; }
  uint64_t now() const { return now_; }
  int64_t bytes() const { return bytes_; }
  int64_t size() const { return static_cast<int64_t>(nodes_.size()); }
  /// The next to go; the index is not empty.
  const std::string& victim() const { return *order_.begin()->key; }
  /// Stored keys whose time of use changed since it was last written.
  std::vector<std::pair<std::string, IndexEntry>> take_touched(size_t at_most);
  /// Throws when sums and orders disagree.
  void check_integrity() const;

 private:
  struct Node {
    IndexEntry entry;
    bool stored = false;
    bool touched = false;
  };
  struct Rank {
    uint64_t last_used;
    int64_t pos, bytes;
    const std::string* key;  ///< of the map's node, which does not move
    bool operator<(const Rank& other) const;
  };
  static Rank rank(const std::pair<const std::string, Node>& node);
  void add(const std::string& key, const Node& node);

  std::unordered_map<std::string, Node> nodes_;
  std::set<Rank> order_;
  std::vector<std::string> touched_;
  int64_t bytes_ = 0;
  uint64_t now_ = 0;
};

}  // namespace hadal::engine_core
