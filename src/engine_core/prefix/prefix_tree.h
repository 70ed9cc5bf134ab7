// Which token prefixes have their pages and states in memory: a radix tree over pages.
//
// A node is one full page: its page_tokens token ids below its parent's, its page number (one
// reference of the pool's) and, where one was kept, the state at its end: a snapshot, which lies in
// pages of the same pool. A tail is the exact end of a conversation inside a page: fewer token ids,
// the partly filled page, always a state. Whoever continues a tail copies the page first. A
// sequence that has a node's page in its table has those of all ancestors too (insert() replaces
// equal pages by the tree's), so that every page held by the tree alone can be evicted, leaves
// first.
//
// Pages and states have one budget, the pool. What goes first is decided by state (state_value.h):
// that whose loss is expected to cost the fewest tokens, computed again, for the pages it frees;
// with a state go the pages that lead to no other. What keys hold (prefix_pins.h) goes after all
// that none does. One thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <memory_resource>
#include <set>
#include <span>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine_core/prefix/page_pool.h"
#include "engine_core/prefix/prefix_pins.h"
#include "engine_core/prefix/state_value.h"

namespace hadal::engine_core {

struct PrefixNode;

struct PrefixMatch {
  int64_t pos = 0;             ///< tokens that need not be computed; 0: none, no state
  std::vector<int64_t> pages;  ///< the known full pages, also past `pos` (their state is missing)
  int64_t tail_page = -1;      ///< the partly filled page, where pos is inside a page
  std::span<const int64_t> snapshot;  ///< pages with the state at pos; valid until the tree changes
  PrefixNode* state = nullptr;        ///< whose; the same
  const char* miss = "new";  ///< CacheReport::miss: "none", "new", "evicted", "tail", "off"
};

class PrefixTree {
 public:
  /// `pool` outlives the tree.
  PrefixTree(int64_t page_tokens, PagePool& pool);
  ~PrefixTree();
  PrefixTree(const PrefixTree&) = delete;
  PrefixTree& operator=(const PrefixTree&) = delete;

  /// The longest prefix of `tokens` of at most `max_pos` tokens whose state is here.
  PrefixMatch match(std::span<const int64_t> tokens, int64_t max_pos) const;
  /// A sequence begins with what was matched, the tree unchanged since: the clock of uses goes on.
  void use(const PrefixMatch& match);

  bool has_state(std::span<const int64_t> tokens) const;

  /// Makes the full pages of `tokens` (all of them computed) known: `pages` are the sequence's.
  /// Where the tree has a page already, the sequence's own is released and replaced by it. Returns
  /// the index of the first page that was new: all full pages after it are.
  int64_t insert(std::span<const int64_t> tokens, std::span<int64_t> pages);
  /// Frees pages until `count` are free for the state of `tokens`, whose full pages are known.
  /// False when what would have to go is worth more. `pinned`: a key will hold it.
  bool make_room(std::span<const int64_t> tokens,
                 StateKind kind,
                 int64_t count,
                 bool pinned = false);
  /// Keeps the state of `tokens` in the pages `snapshot`, whose only holder is the caller: they are
  /// the tree's from now on. `pages` are the sequence's; the last may be a partial one.
  void keep_state(std::span<const int64_t> tokens,
                  std::span<const int64_t> pages,
                  std::span<const int64_t> snapshot,
                  StateKind kind);

  /// `key` holds the state of `tokens`, if there is one, in place of what it held there.
  void pin(const CacheKey& key,
           std::span<const int64_t> tokens,
           Pin which,
           PrefixPins::Clock::time_point now);
  /// A sequence of the key's began with what was matched and used: holds it where it comes again.
  void use_pinned(const CacheKey& key, const PrefixMatch& match, PrefixPins::Clock::time_point now);
  /// Lets go what is past its time.
  void expire_pins(PrefixPins::Clock::time_point now) { pins_.expire(now); }
  const PrefixPins& pins() const { return pins_; }

  /// Frees at least one page that only the tree holds: one that leads to no state, else those of
  /// the state that is worth the least. False: none.
  bool evict();
  /// Gives up the tail with this page, so that its only other holder may write to it.
  void forget_tail(int64_t page);
  void clear();

  int64_t num_snapshot_pages() const { return num_snapshot_pages_; }
  int64_t num_states() const { return static_cast<int64_t>(states_.size()); }
  int64_t num_nodes() const { return num_nodes_; }
  int64_t num_evicted() const { return num_evicted_; }  ///< states, ever
  /// Of a node in memory beside its page: token ids, links, what is remembered of it when it goes.
  static int64_t node_bytes(int64_t page_tokens);

  /// Adds the tree's references to `expected` [num_pages]. Errors: Error for anything inconsistent.
  void check_integrity(std::span<int64_t> expected) const;

 private:
  using Node = PrefixNode;
  struct Less {
    using is_transparent = void;
    template <typename A, typename B>
    bool operator()(const A& a, const B& b) const;
  };
  /// By the node's token ids, which lie in ids_.
  struct DeleteNode {
    void operator()(Node* node) const;
  };
  using NodePtr = std::unique_ptr<Node, DeleteNode>;
  using Children = std::pmr::map<std::span<const int32_t>, NodePtr, Less>;
  friend struct PrefixNode;
  struct Counted {
    int64_t nodes = 0, states = 0, snapshot_pages = 0, stateless = 0, pinned_pages = 0;
  };

  void take_memory(int64_t num_pages);
  NodePtr make_node();
  Node* add(Node& parent, std::span<const int64_t> tokens, int64_t page);
  void remove(Node& node);
  void remove_stateless(Node& leaf);
  void drop_state(Node& node);
  Node* find(std::span<const int64_t> tokens) const;
  Node* last_page(std::span<const int64_t> tokens) const;
  void weigh(Node& node) const;
  static bool goes_on(const Node& tail);
  double worth(const Node& node) const;
  Node* least_worth();
  void remember_evicted(const Node& node);
  void count_interval(uint64_t interval);
  bool is_leaf(const Node& node) const;
  static Node* longest_tail(const Node& node, std::span<const int64_t> rest);
  template <typename Ids>
  static int64_t tail_before(const Node& node, const Ids& ids);
  static int64_t longest_overlap(const Children& children, std::span<const int64_t> rest);
  const char* miss_reason(std::span<const int64_t> tokens,
                          int64_t pos,
                          int64_t max_pos,
                          const std::vector<Node*>& path) const;
  void check_node(const Node& node, std::span<int64_t> expected, Counted& counted) const;

  int64_t page_tokens_;
  PagePool& pool_;
  /// Of all that grows with the nodes. Taken in one piece and from the start: node by node it would
  /// lie scattered among what a step takes and frees, and keep its memory from going back.
  std::pmr::unsynchronized_pool_resource memory_;
  std::vector<int32_t> ids_;  ///< [num_pages, page_tokens] of the nodes' pages
  PrefixPins pins_;
  NodePtr root_;
  std::vector<Node*> states_;                            ///< nodes with one; a node knows its place
  std::pmr::set<std::pair<uint64_t, Node*>> stateless_;  ///< leaves without one, by age
  std::pmr::unordered_map<int64_t, Node*> tails_;        ///< by page
  std::pmr::unordered_map<uint64_t, uint64_t> evicted_;  ///< hashes: last use
  std::pmr::deque<uint64_t> evicted_order_;
  StateOdds odds_;
  double usual_interval_ = 1;  ///< between the uses of a conversation
  int64_t num_snapshot_pages_ = 0, num_nodes_ = 0, num_evicted_ = 0;
  uint64_t clock_ = 0;  ///< uses
  size_t scan_ = 0;     ///< where the search for the least worth begins
  uint64_t last_node_ = 0;
};

}  // namespace hadal::engine_core
