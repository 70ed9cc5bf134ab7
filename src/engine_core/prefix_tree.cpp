#include "engine_core/prefix_tree.h"

#include <algorithm>

#include "base/check.h"
#include "base/math.h"

namespace hadal::engine {
namespace {

constexpr size_t kMaxRemembered = 1 << 16;  ///< evicted prefixes whose return is recognised
constexpr int kCandidates = 8;              ///< snapshots among which the largest goes first

// Of a prefix: that of the pages before, then the page's tokens.
uint64_t chain(uint64_t state, std::span<const int64_t> tokens) {
  for (const int64_t token : tokens) {
    state = (state ^ static_cast<uint64_t>(token)) * 0x9e3779b97f4a7c15ull;
    state ^= state >> 29;
  }
  return state;
}

int64_t common_prefix(std::span<const int64_t> a, std::span<const int64_t> b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

}  // namespace

struct PrefixTree::Node {
  Node* parent = nullptr;
  const std::vector<int64_t>* tokens = nullptr;  ///< the key in the parent's map
  bool is_tail = false;
  bool lost_snapshot = false;
  int64_t page = -1;
  uint64_t hash = 0;  ///< chain() of all tokens through this node
  uint64_t last_use = 0;
  std::vector<std::byte> snapshot;  ///< empty: none
  Children children, tails;
};

bool PrefixTree::Less::operator()(std::span<const int64_t> a, std::span<const int64_t> b) const {
  return std::ranges::lexicographical_compare(a, b);
}

PrefixTree::PrefixTree(int64_t page_tokens, int64_t snapshot_budget_bytes, PagePool& pool)
    : page_tokens_(page_tokens),
      snapshot_budget_(snapshot_budget_bytes),
      pool_(pool),
      root_(std::make_unique<Node>()) {
  HADAL_CHECK(page_tokens > 0, "prefix_tree: pages of ", page_tokens, " tokens");
}

PrefixTree::~PrefixTree() = default;

bool PrefixTree::is_leaf(const Node& node) const {
  return &node != root_.get() && node.children.empty() && node.tails.empty();
}

PrefixTree::Node* PrefixTree::add(Node& parent, std::span<const int64_t> tokens, int64_t page) {
  const bool is_tail = static_cast<int64_t>(tokens.size()) < page_tokens_;
  Children& siblings = is_tail ? parent.tails : parent.children;
  const auto [at, added] = siblings.emplace(std::vector<int64_t>(tokens.begin(), tokens.end()),
                                            std::make_unique<Node>());
  HADAL_CHECK(added, "prefix_tree: added twice");
  pool_.share_with_tree(page);
  leaves_.erase({parent.last_use, &parent});
  Node& node = *at->second;
  node.parent = &parent;
  node.tokens = &at->first;
  node.is_tail = is_tail;
  node.page = page;
  node.hash = chain(parent.hash, tokens);
  node.last_use = ++clock_;
  leaves_.emplace(node.last_use, &node);
  if (is_tail) tails_.emplace(page, &node);
  ++num_nodes_;
  return &node;
}

void PrefixTree::remove(Node& node) {
  HADAL_CHECK(is_leaf(node), "prefix_tree: only leaves are removed");
  Node& parent = *node.parent;
  leaves_.erase({node.last_use, &node});
  if (!node.snapshot.empty()) {
    snapshots_.erase({node.last_use, &node});
    snapshot_bytes_ -= static_cast<int64_t>(node.snapshot.size());
  }
  if (node.is_tail) tails_.erase(node.page);
  pool_.release_from_tree(node.page);
  --num_nodes_;
  Children& siblings = node.is_tail ? parent.tails : parent.children;
  siblings.erase(siblings.find(std::span<const int64_t>(*node.tokens)));
  if (is_leaf(parent)) leaves_.emplace(parent.last_use, &parent);
}

void PrefixTree::touch(Node& node) {
  if (&node == root_.get()) return;
  const uint64_t now = ++clock_;
  if (is_leaf(node)) {
    leaves_.erase({node.last_use, &node});
    leaves_.emplace(now, &node);
  }
  if (!node.snapshot.empty()) {
    snapshots_.erase({node.last_use, &node});
    snapshots_.emplace(now, &node);
  }
  node.last_use = now;
}

void PrefixTree::set_snapshot(Node& node, std::vector<std::byte> snapshot) {
  if (!node.snapshot.empty() || snapshot.empty()) return;
  node.snapshot = std::move(snapshot);
  node.lost_snapshot = false;
  snapshots_.emplace(node.last_use, &node);
  snapshot_bytes_ += static_cast<int64_t>(node.snapshot.size());
}

void PrefixTree::drop_snapshot(Node& node) {
  snapshots_.erase({node.last_use, &node});
  snapshot_bytes_ -= static_cast<int64_t>(node.snapshot.size());
  node.snapshot = {};
  node.lost_snapshot = true;
  // Pages that lead to no state serve nobody.
  Node* at = &node;
  while (is_leaf(*at) && at->snapshot.empty() && (at->is_tail || pool_.references(at->page) == 1)) {
    Node* parent = at->parent;
    if (!at->is_tail) remember_evicted(at->hash);
    remove(*at);
    at = parent;
  }
}

void PrefixTree::evict_snapshots(const Node* keep) {
  while (snapshot_bytes_ > snapshot_budget_) {
    Node* victim = nullptr;
    int seen = 0;
    for (const auto& [use, node] : snapshots_) {
      if (node == keep) continue;
      if (victim == nullptr || node->snapshot.size() > victim->snapshot.size()) victim = node;
      if (++seen == kCandidates) break;
    }
    if (victim == nullptr) return;
    drop_snapshot(*victim);
  }
}

void PrefixTree::remember_evicted(uint64_t hash) {
  if (!evicted_.insert(hash).second) return;
  evicted_order_.push_back(hash);
  if (evicted_order_.size() <= kMaxRemembered) return;
  evicted_.erase(evicted_order_.front());
  evicted_order_.pop_front();
}

// The longest tail that `rest` begins with: the predecessor in the order of tails either is one or
// tells how short the next candidate must be.
const PrefixTree::Node* PrefixTree::longest_tail(const Node& node, std::span<const int64_t> rest) {
  auto at = node.tails.upper_bound(rest);
  while (at != node.tails.begin()) {
    --at;
    const int64_t common = common_prefix(at->first, rest);
    if (common == static_cast<int64_t>(at->first.size())) return at->second.get();
    rest = rest.first(static_cast<size_t>(common));
    at = node.tails.upper_bound(rest);
  }
  return nullptr;
}

int64_t PrefixTree::longest_overlap(const Children& children, std::span<const int64_t> rest) {
  // The longest common prefix is with a neighbour in lexicographic order.
  const auto next = children.lower_bound(rest);
  int64_t longest = 0;
  if (next != children.end()) longest = common_prefix(next->first, rest);
  if (next != children.begin()) {
    longest = std::max(longest, common_prefix(std::prev(next)->first, rest));
  }
  return longest;
}

PrefixMatch PrefixTree::match(std::span<const int64_t> tokens, int64_t max_pos) {
  max_pos = std::min(max_pos, static_cast<int64_t>(tokens.size()));
  PrefixMatch result;
  std::vector<Node*> path = {root_.get()};  // path[i]: i pages known
  const auto rest_after = [&](int64_t pages) {
    return tokens.subspan(static_cast<size_t>(pages * page_tokens_));
  };
  for (std::span<const int64_t> rest = tokens; static_cast<int64_t>(rest.size()) >= page_tokens_;) {
    Children& children = path.back()->children;
    const auto found = children.find(rest.first(static_cast<size_t>(page_tokens_)));
    if (found == children.end()) break;
    path.push_back(found->second.get());
    result.pages.push_back(found->second->page);
    rest = rest.subspan(static_cast<size_t>(page_tokens_));
  }
  for (auto pages = static_cast<int64_t>(path.size()) - 1; pages >= 0; --pages) {
    const int64_t begin = pages * page_tokens_;
    if (begin > max_pos) continue;
    Node& node = *path[static_cast<size_t>(pages)];
    const auto limit = static_cast<size_t>(max_pos - begin);
    const Node* tail = longest_tail(node, rest_after(pages).first(limit));
    const Node* state = tail != nullptr ? tail : (node.snapshot.empty() ? nullptr : &node);
    if (state == nullptr) continue;
    result.pos = begin + (tail != nullptr ? static_cast<int64_t>(tail->tokens->size()) : 0);
    if (tail != nullptr) {
      result.tail_page = tail->page;
      touch(*node.tails.find(std::span<const int64_t>(*tail->tokens))->second);
    }
    result.snapshot = state->snapshot;
    break;
  }
  // Leaves first: a parent is never older than its children.
  for (auto node = path.rbegin(); node != path.rend(); ++node) touch(**node);
  result.miss = miss_reason(tokens, result.pos, max_pos, path);
  return result;
}

const char* PrefixTree::miss_reason(std::span<const int64_t> tokens,
                                    int64_t pos,
                                    int64_t max_pos,
                                    const std::vector<Node*>& path) const {
  if (pos == max_pos) return "tail";  // the last token is always computed
  const auto pages = static_cast<int64_t>(path.size()) - 1;
  const Node& last = *path.back();
  const auto rest = tokens.subspan(static_cast<size_t>(pages * page_tokens_));
  if (static_cast<int64_t>(rest.size()) >= page_tokens_ &&
      evicted_.contains(chain(last.hash, rest.first(static_cast<size_t>(page_tokens_))))) {
    return "evicted";
  }
  const int64_t overlap =
      std::max(longest_overlap(last.children, rest), longest_overlap(last.tails, rest));
  const int64_t known = std::max(pos, pages * page_tokens_ + overlap);
  if (static_cast<int64_t>(tokens.size()) - known > known - pos) return "new";
  for (int64_t page = pos / page_tokens_ + 1; page <= pages; ++page) {
    if (path[static_cast<size_t>(page)]->lost_snapshot) return "evicted";
  }
  return "tail";
}

bool PrefixTree::has_snapshot(std::span<const int64_t> tokens) const {
  const Node* node = root_.get();
  while (!tokens.empty()) {
    const size_t count = std::min(tokens.size(), static_cast<size_t>(page_tokens_));
    const Children& children =
        static_cast<int64_t>(count) < page_tokens_ ? node->tails : node->children;
    const auto found = children.find(tokens.first(count));
    if (found == children.end()) return false;
    node = found->second.get();
    tokens = tokens.subspan(count);
  }
  return !node->snapshot.empty();
}

int64_t PrefixTree::insert(std::span<const int64_t> tokens,
                           std::span<int64_t> pages,
                           std::optional<std::vector<std::byte>> snapshot) {
  const auto num_full = static_cast<int64_t>(tokens.size()) / page_tokens_;
  HADAL_CHECK(
      static_cast<int64_t>(pages.size()) * page_tokens_ >= static_cast<int64_t>(tokens.size()),
      "prefix_tree: ", pages.size(), " pages for ", tokens.size(), " tokens");
  if (snapshot && static_cast<int64_t>(snapshot->size()) > snapshot_budget_) snapshot.reset();
  Node* node = root_.get();
  std::vector<Node*> path;
  int64_t first_new = num_full;
  for (int64_t page = 0; page < num_full; ++page) {
    const auto key =
        tokens.subspan(static_cast<size_t>(page * page_tokens_), static_cast<size_t>(page_tokens_));
    int64_t& mine = pages[static_cast<size_t>(page)];
    const auto found = node->children.find(key);
    if (found == node->children.end()) {
      first_new = std::min(first_new, page);
      node = add(*node, key, mine);
    } else {
      node = found->second.get();
      if (node->page != mine) {
        pool_.share(node->page);
        pool_.release(mine);
        mine = node->page;
      }
    }
    path.push_back(node);
  }
  const auto tail = tokens.subspan(static_cast<size_t>(num_full * page_tokens_));
  if (!tail.empty() && snapshot && !snapshot->empty()) {
    const auto found = node->tails.find(tail);
    // A page is at most one tail: a second end in it belongs to the same sequence, later.
    const int64_t page = pages[static_cast<size_t>(num_full)];
    if (found == node->tails.end() && pool_.in_tree(page)) forget_tail(page);
    node = found == node->tails.end() ? add(*node, tail, page) : found->second.get();
    path.push_back(node);
  }
  for (auto known = path.rbegin(); known != path.rend(); ++known) touch(**known);
  if (snapshot && !path.empty()) {
    set_snapshot(*node, std::move(*snapshot));
    evict_snapshots(node);
  }
  return first_new;
}

bool PrefixTree::evict_page() {
  for (const auto& [use, node] : leaves_) {
    if (pool_.references(node->page) != 1) continue;
    if (!node->is_tail) remember_evicted(node->hash);
    remove(*node);
    return true;
  }
  return false;
}

void PrefixTree::forget_tail(int64_t page) {
  const auto found = tails_.find(page);
  HADAL_CHECK(found != tails_.end(), "prefix_tree: page ", page, " is no tail's");
  remove(*found->second);
}

void PrefixTree::clear() {
  while (!leaves_.empty()) remove(*leaves_.begin()->second);
}

void PrefixTree::check_node(const Node& node,
                            std::span<int64_t> expected,
                            int64_t& nodes,
                            int64_t& snapshots,
                            int64_t& bytes,
                            int64_t& leaves) const {
  if (&node != root_.get()) {
    ++nodes;
    HADAL_CHECK(pool_.in_tree(node.page), "prefix_tree: page ", node.page, " is not the tree's");
    ++expected[static_cast<size_t>(node.page)];
    HADAL_CHECK((static_cast<int64_t>(node.tokens->size()) < page_tokens_) == node.is_tail &&
                    !node.tokens->empty(),
                "prefix_tree: a page of ", node.tokens->size(), " tokens");
    HADAL_CHECK(node.hash == chain(node.parent->hash, *node.tokens), "prefix_tree: hash differs");
    if (is_leaf(node)) {
      ++leaves;
      HADAL_CHECK(leaves_.contains({node.last_use, const_cast<Node*>(&node)}),
                  "prefix_tree: a leaf is missing in the order");
    }
    HADAL_CHECK(
        !node.is_tail || (is_leaf(node) && !node.snapshot.empty() && tails_.at(node.page) == &node),
        "prefix_tree: a tail without state or with children");
    if (!node.snapshot.empty()) {
      ++snapshots;
      bytes += static_cast<int64_t>(node.snapshot.size());
      HADAL_CHECK(snapshots_.contains({node.last_use, const_cast<Node*>(&node)}),
                  "prefix_tree: a snapshot is missing in the order");
    }
  }
  for (const Children* group : {&node.children, &node.tails}) {
    for (const auto& [key, child] : *group) {
      HADAL_CHECK(child->parent == &node && child->tokens == &key, "prefix_tree: wrong parent");
      HADAL_CHECK(&node == root_.get() || pool_.references(node.page) >= 1, "prefix_tree: free");
      check_node(*child, expected, nodes, snapshots, bytes, leaves);
    }
  }
}

void PrefixTree::check_integrity(std::span<int64_t> expected) const {
  int64_t nodes = 0, snapshots = 0, bytes = 0, leaves = 0;
  check_node(*root_, expected, nodes, snapshots, bytes, leaves);
  HADAL_CHECK(nodes == num_nodes_ && bytes == snapshot_bytes_ &&
                  snapshots == static_cast<int64_t>(snapshots_.size()) &&
                  leaves == static_cast<int64_t>(leaves_.size()),
              "prefix_tree: counted ", nodes, " nodes, ", snapshots, " snapshots of ", bytes,
              " bytes, ", leaves, " leaves");
  HADAL_CHECK(snapshot_bytes_ <= snapshot_budget_, "prefix_tree: ", snapshot_bytes_,
              " bytes of snapshots, at most ", snapshot_budget_);
  HADAL_CHECK(evicted_.size() == evicted_order_.size(), "prefix_tree: evicted prefixes differ");
}

}  // namespace hadal::engine
