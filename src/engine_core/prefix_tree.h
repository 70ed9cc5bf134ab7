// Which token prefixes have their pages and states in memory: a radix tree over pages.
//
// A node is one full page: its page_tokens token ids below its parent's, its page number (one
// reference of the pool's) and, where one was saved, the snapshot of the state at its end. A tail
// is the exact end of a conversation inside a page: fewer token ids, the partly filled page, always
// a snapshot. Whoever continues a tail copies the page first. A sequence that has a node's page in
// its table has those of all ancestors too (insert() replaces equal pages by the tree's), so that
// every page held by the tree alone can be evicted, leaves first.
//
// Pages are evicted by recency. Snapshots have a byte budget of their own; of the eight least
// recently used the largest goes first, and pages that no snapshot needs any more go with it. One
// thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "engine_core/page_pool.h"

namespace hadal::engine {

struct PrefixMatch {
  int64_t pos = 0;             ///< tokens that need not be computed; 0: none, no snapshot
  std::vector<int64_t> pages;  ///< the known full pages, also past `pos` (their state is missing)
  int64_t tail_page = -1;      ///< the partly filled page, where pos is inside a page
  std::span<const std::byte> snapshot;  ///< at pos; valid until the tree changes
  const char* miss = "new";             ///< why the rest missed: "new", "evicted", "tail", "off"
};

class PrefixTree {
 public:
  /// `pool` outlives the tree.
  PrefixTree(int64_t page_tokens, int64_t snapshot_budget_bytes, PagePool& pool);
  ~PrefixTree();
  PrefixTree(const PrefixTree&) = delete;
  PrefixTree& operator=(const PrefixTree&) = delete;

  /// The longest prefix of `tokens` of at most `max_pos` tokens whose state is here; counts as a
  /// use. "tail": the rest is known but lies after the last snapshot, "evicted": it was known once;
  /// of several reasons that of the most tokens.
  PrefixMatch match(std::span<const int64_t> tokens, int64_t max_pos);

  bool has_snapshot(std::span<const int64_t> tokens) const;

  /// Makes `tokens` (all of them computed) known: `pages` are the sequence's, at least
  /// ceil(tokens / page_tokens). Where the tree has a full page already, the sequence's own is
  /// released and replaced by it. Without a snapshot a partial last page is not kept. Returns the
  /// index of the first page that was new: all full pages after it are.
  int64_t insert(std::span<const int64_t> tokens,
                 std::span<int64_t> pages,
                 std::optional<std::vector<std::byte>> snapshot);

  /// Frees the least recently used page that only the tree holds, with its snapshot. False: none.
  bool evict_page();
  /// Gives up the tail with this page, so that its only other holder may write to it.
  void forget_tail(int64_t page);
  void clear();

  int64_t snapshot_bytes() const { return snapshot_bytes_; }
  int64_t num_snapshots() const { return static_cast<int64_t>(snapshots_.size()); }
  int64_t num_nodes() const { return num_nodes_; }

  /// Adds the tree's references to `expected` [num_pages]. Errors: Error for anything inconsistent.
  void check_integrity(std::span<int64_t> expected) const;

 private:
  struct Less {
    using is_transparent = void;
    bool operator()(std::span<const int64_t> a, std::span<const int64_t> b) const;
  };
  struct Node;
  using Children = std::map<std::vector<int64_t>, std::unique_ptr<Node>, Less>;
  using Order = std::set<std::pair<uint64_t, Node*>>;  ///< by last use

  Node* add(Node& parent, std::span<const int64_t> tokens, int64_t page);
  void remove(Node& node);
  void touch(Node& node);
  void set_snapshot(Node& node, std::vector<std::byte> snapshot);
  void drop_snapshot(Node& node);
  void evict_snapshots(const Node* keep);
  void remember_evicted(uint64_t hash);
  bool is_leaf(const Node& node) const;
  static const Node* longest_tail(const Node& node, std::span<const int64_t> rest);
  static int64_t longest_overlap(const Children& children, std::span<const int64_t> rest);
  const char* miss_reason(std::span<const int64_t> tokens,
                          int64_t pos,
                          int64_t max_pos,
                          const std::vector<Node*>& path) const;
  void check_node(const Node& node,
                  std::span<int64_t> expected,
                  int64_t& nodes,
                  int64_t& snapshots,
                  int64_t& bytes,
                  int64_t& leaves) const;

  int64_t page_tokens_, snapshot_budget_;
  PagePool& pool_;
  std::unique_ptr<Node> root_;
  Order leaves_, snapshots_;
  std::unordered_map<int64_t, Node*> tails_;  ///< by page
  std::unordered_set<uint64_t> evicted_;      ///< hashes of prefixes that were known once
  std::deque<uint64_t> evicted_order_;
  int64_t snapshot_bytes_ = 0, num_nodes_ = 0;
  uint64_t clock_ = 0;
};

}  // namespace hadal::engine
