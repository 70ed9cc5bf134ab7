// A node of the prefix tree: a page, or the partly filled one where a conversation ends. Included
// by the tree's own files only.
#pragma once

#include <cstdint>
#include <memory_resource>
#include <span>
#include <vector>

#include "engine_core/prefix/prefix_tree.h"

namespace hadal::engine_core {

struct PrefixNode {
  explicit PrefixNode(std::pmr::memory_resource* memory)
      : snapshot(memory), children(memory), tails(memory) {}

  PrefixNode* parent = nullptr;
  std::span<const int32_t> tokens;  ///< the key in the parent's map
  int64_t begin = 0;                ///< position of its first token
  bool is_tail = false;
  bool lost_state = false;
  int64_t page = -1;
  uint64_t hash = 0;      ///< chain() of all tokens through this node
  uint64_t order = 0;     ///< of its making
  uint64_t last_use = 0;  ///< when its state was made or last used, by the tree's clock
  uint64_t interval = 0;  ///< between uses of this conversation; 0: unknown
  std::pmr::vector<int64_t> snapshot;  ///< pages; empty: no state
  StateKind kind = StateKind::kPage;
  int64_t uses = 0;
  bool passed = false;  ///< somebody came this way and went on from a later state
  size_t place = 0;     ///< in states_
  int pins = 0;         ///< of keys that hold this state
  int pins_below = 0;   ///< of it and of all states behind it
  // As weigh() found them; others may have come or gone since.
  int64_t cost = 0;   ///< tokens from the state before it on
  int64_t frees = 1;  ///< pages
  bool last = true;   ///< no state further on: it serves whoever comes this way
  PrefixTree::Children children, tails;

  int64_t end() const { return begin + std::ssize(tokens); }
  bool has_state() const { return !snapshot.empty(); }
};

}  // namespace hadal::engine_core
