#include "engine_core/prefix/prefix_tree.h"

#include <algorithm>
#include <cstring>

#include "base/check.h"
#include "base/math.h"
#include "engine_core/prefix/prefix_node.h"

namespace hadal::engine_core {
namespace {

constexpr int64_t kLeastRemembered = 1 << 10;  ///< evicted prefixes whose return is recognised
constexpr size_t kCandidates = 4096;           ///< states among which the least worth is sought
constexpr size_t kOneConversation = 3;         ///< nodes behind one: a prompt, its answer, the next
constexpr double kIntervals = 64;              ///< between uses, over which the usual one is taken
constexpr int64_t kPinnedShare = 2;            ///< of the pages, at most, are held by keys
constexpr int kWeighings = 8;                  ///< until the one found is the one to go

// Bytes in the books of a page in memory: entries in a map of siblings, of a set or table, of a
// state's pages; about so many pages come to a state, with its own.
constexpr int64_t kEntry = 64, kShortEntry = 48, kSnapshot = 112, kPagesAState = 4;

// Of a prefix: that of the pages before, then the page's tokens.
template <typename Ids>
uint64_t chain(uint64_t state, const Ids& tokens) {
  for (const auto token : tokens) {
    state = (state ^ static_cast<uint64_t>(token)) * 0x9e3779b97f4a7c15ull;
    state ^= state >> 29;
  }
  return state;
}

template <typename A, typename B>
int64_t common_prefix(const A& a, const B& b) {
  return std::ranges::mismatch(a, b).in1 - a.begin();
}

}  // namespace

template <typename A, typename B>
bool PrefixTree::Less::operator()(const A& a, const B& b) const {
  return std::ranges::lexicographical_compare(a, b);
}

PrefixTree::PrefixTree(int64_t page_tokens, PagePool& pool)
    : page_tokens_(page_tokens),
      pool_(pool),
      ids_(static_cast<size_t>(pool.num_pages() * page_tokens)),
      pins_(pool.num_pages() / kPinnedShare),
      stateless_(&memory_),
      tails_(&memory_),
      evicted_(&memory_),
      evicted_order_(&memory_) {
  HADAL_CHECK(page_tokens > 0, "prefix_tree: pages of ", page_tokens, " tokens");
  take_memory(pool.num_pages());
  root_ = make_node();
}

PrefixTree::~PrefixTree() = default;

int64_t PrefixTree::node_bytes(int64_t page_tokens) {
  // Token ids, what take_memory() takes, and entries of lists and tables.
  return page_tokens * 4 + static_cast<int64_t>(sizeof(Node)) + kEntry + kSnapshot / kPagesAState +
         2 * kShortEntry + 48;
}

// Blocks as a tree takes them that is full, written once and freed: the pool keeps them.
void PrefixTree::take_memory(int64_t num_pages) {
  std::vector<void*> blocks;
  const auto take = [&](int64_t size, int64_t count) {
    blocks.clear();
    for (int64_t i = 0; i < count; ++i) {
      blocks.push_back(memory_.allocate(static_cast<size_t>(size)));
      std::memset(blocks.back(), 0, static_cast<size_t>(size));
    }
    for (void* block : blocks) memory_.deallocate(block, static_cast<size_t>(size));
  };
  take(static_cast<int64_t>(sizeof(Node)), num_pages);
  take(kEntry, num_pages);
  take(kSnapshot, num_pages / kPagesAState);
  take(kShortEntry, 2 * num_pages);
  states_.reserve(static_cast<size_t>(num_pages));
  evicted_.reserve(static_cast<size_t>(std::max(num_pages, kLeastRemembered)));
}

PrefixTree::NodePtr PrefixTree::make_node() {
  return NodePtr(std::pmr::polymorphic_allocator<>(&memory_).new_object<Node>(&memory_));
}

void PrefixTree::DeleteNode::operator()(Node* node) const {
  std::pmr::polymorphic_allocator<>(node->snapshot.get_allocator().resource()).delete_object(node);
}

bool PrefixTree::is_leaf(const Node& node) const {
  return &node != root_.get() && node.children.empty() && node.tails.empty();
}

PrefixTree::Node* PrefixTree::add(Node& parent, std::span<const int64_t> tokens, int64_t page) {
  const bool is_tail = std::ssize(tokens) < page_tokens_;
  Children& siblings = is_tail ? parent.tails : parent.children;
  const auto mine =
      std::span(ids_).subspan(static_cast<size_t>(page * page_tokens_), tokens.size());
  std::ranges::transform(tokens, mine.begin(), [](int64_t id) { return static_cast<int32_t>(id); });
  const auto [at, added] = siblings.emplace(mine, make_node());
  HADAL_CHECK(added, "prefix_tree: added twice");
  pool_.share_with_tree(page);
  stateless_.erase({parent.order, &parent});
  Node& node = *at->second;
  node.parent = &parent;
  node.tokens = at->first;
  node.begin = &parent == root_.get() ? 0 : parent.end();
  node.is_tail = is_tail;
  node.page = page;
  node.hash = chain(parent.hash, tokens);
  node.order = ++last_node_;
  node.last_use = clock_;
  // Those that begin where others began have a rhythm of their own.
  if (parent.uses < 2 && parent.children.size() + parent.tails.size() <= kOneConversation)
    node.interval = parent.interval;
  if (const auto before = evicted_.find(node.hash); before != evicted_.end()) {
    node.interval = std::max<uint64_t>(clock_ - before->second, 1);
    count_interval(node.interval);
  }
  stateless_.emplace(node.order, &node);
  if (is_tail) tails_.emplace(page, &node);
  ++num_nodes_;
  return &node;
}

void PrefixTree::remove(Node& node) {
  HADAL_CHECK(is_leaf(node) && !node.has_state(), "prefix_tree: only stateless leaves are removed");
  Node& parent = *node.parent;
  stateless_.erase({node.order, &node});
  if (node.is_tail) tails_.erase(node.page);
  pool_.release_from_tree(node.page);
  --num_nodes_;
  Children& siblings = node.is_tail ? parent.tails : parent.children;
  siblings.erase(siblings.find(node.tokens));
  if (is_leaf(parent) && !parent.has_state()) stateless_.emplace(parent.order, &parent);
}

// Pages that lead to no state serve nobody.
void PrefixTree::remove_stateless(Node& leaf) {
  Node* at = &leaf;
  while (is_leaf(*at) && !at->has_state() && (at->is_tail || pool_.references(at->page) == 1)) {
    Node* parent = at->parent;
    if (!at->is_tail) remember_evicted(*at);
    if (!parent->has_state()) parent->last_use = std::max(parent->last_use, at->last_use);
    remove(*at);
    at = parent;
  }
}

void PrefixTree::drop_state(Node& node) {
  if (node.pins > 0) pins_.forget(node);
  for (const int64_t page : node.snapshot) pool_.release_from_tree(page);
  num_snapshot_pages_ -= std::ssize(node.snapshot);
  node.snapshot.clear();
  node.snapshot.shrink_to_fit();
  node.lost_state = true;
  states_[node.place] = states_.back();
  states_[node.place]->place = node.place;
  states_.pop_back();
  if (is_leaf(node)) stateless_.emplace(node.order, &node);
}

void PrefixTree::remember_evicted(const Node& node) {
  if (!evicted_.insert_or_assign(node.hash, node.last_use).second) return;
  evicted_order_.push_back(node.hash);
  const auto most = static_cast<size_t>(std::max(pool_.num_pages(), kLeastRemembered));
  if (evicted_order_.size() <= most) return;
  evicted_.erase(evicted_order_.front());
  evicted_order_.pop_front();
}

// The longest tail that `rest` begins with: the predecessor in the order of tails either is one or
// tells how short the next candidate must be.
PrefixTree::Node* PrefixTree::longest_tail(const Node& node, std::span<const int64_t> rest) {
  auto at = node.tails.upper_bound(rest);
  while (at != node.tails.begin()) {
    --at;
    const int64_t common = common_prefix(at->first, rest);
    if (common == std::ssize(at->first)) return at->second.get();
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

PrefixMatch PrefixTree::match(std::span<const int64_t> tokens, int64_t max_pos) const {
  max_pos = std::min(max_pos, std::ssize(tokens));
  PrefixMatch result;
  std::vector<Node*> path = {root_.get()};  // path[i]: i pages known
  const auto rest_after = [&](int64_t pages) {
    return tokens.subspan(static_cast<size_t>(pages * page_tokens_));
  };
  for (std::span<const int64_t> rest = tokens; std::ssize(rest) >= page_tokens_;) {
    const Children& children = path.back()->children;
    const auto found = children.find(rest.first(static_cast<size_t>(page_tokens_)));
    if (found == children.end()) break;
    path.push_back(found->second.get());
    result.pages.push_back(found->second->page);
    rest = rest.subspan(static_cast<size_t>(page_tokens_));
  }
  for (auto pages = std::ssize(path) - 1; pages >= 0; --pages) {
    const int64_t begin = pages * page_tokens_;
    if (begin > max_pos) continue;
    Node& node = *path[static_cast<size_t>(pages)];
    const auto limit = static_cast<size_t>(max_pos - begin);
    Node* tail = longest_tail(node, rest_after(pages).first(limit));
    Node* state = tail != nullptr ? tail : (node.has_state() ? &node : nullptr);
    if (state == nullptr) continue;
    result.pos = state->end();
    if (tail != nullptr) result.tail_page = tail->page;
    result.snapshot = state->snapshot;
    result.state = state;
    break;
  }
  result.miss = miss_reason(tokens, result.pos, max_pos, path);
  return result;
}

void PrefixTree::use(const PrefixMatch& match) {
  ++clock_;
  if (match.state == nullptr) return;
  Node& state = *match.state;
  const uint64_t passed = std::max<uint64_t>(clock_ - state.last_use, 1);
  count_interval(passed);
  state.interval = state.interval == 0 ? passed : (state.interval + passed + 1) / 2;
  if (state.uses < 2) odds_.count_used(state.kind);
  if (++state.uses == 1) {
    state.kind = StateKind::kAgain;
    state.passed = false;
  }
  state.last_use = clock_;
  // Those on the way there since it was used last were of no use this time.
  for (Node* at = state.parent; at != root_.get() && !(at->has_state() && at->passed);
       at = at->parent) {
    if (!at->has_state()) continue;
    if (at->uses < 2) odds_.count_passed(at->kind);
    at->passed = true;
  }
  // What goes on from a tail hangs on its parent.
  if (state.is_tail && state.parent != root_.get()) state.parent->interval = state.interval;
}

void PrefixTree::count_interval(uint64_t interval) {
  usual_interval_ += (static_cast<double>(interval) - usual_interval_) / kIntervals;
}

// Why seen tokens are computed again, where there are more of them than of those never seen.
const char* PrefixTree::miss_reason(std::span<const int64_t> tokens,
                                    int64_t pos,
                                    int64_t max_pos,
                                    const std::vector<Node*>& path) const {
  const char* const all_reused = pos > 0 ? "none" : "new";
  if (pos == max_pos) return all_reused;  // the last token is always computed
  const auto pages = std::ssize(path) - 1;
  const Node& last = *path.back();
  const auto rest = tokens.subspan(static_cast<size_t>(pages * page_tokens_));
  if (std::ssize(rest) >= page_tokens_ &&
      evicted_.contains(chain(last.hash, rest.first(static_cast<size_t>(page_tokens_))))) {
    return "evicted";
  }
  const int64_t overlap =
      std::max(longest_overlap(last.children, rest), longest_overlap(last.tails, rest));
  const int64_t known = std::max(pos, pages * page_tokens_ + overlap);
  if (known == pos || std::ssize(tokens) - known > known - pos) return all_reused;
  for (int64_t page = pos / page_tokens_ + 1; page <= pages; ++page) {
    if (path[static_cast<size_t>(page)]->lost_state) return "evicted";
  }
  return "tail";
}

// The node of the last full page of `tokens`, or the root; null when it is not known.
PrefixTree::Node* PrefixTree::last_page(std::span<const int64_t> tokens) const {
  Node* node = root_.get();
  for (; std::ssize(tokens) >= page_tokens_;
       tokens = tokens.subspan(static_cast<size_t>(page_tokens_))) {
    const auto found = node->children.find(tokens.first(static_cast<size_t>(page_tokens_)));
    if (found == node->children.end()) return nullptr;
    node = found->second.get();
  }
  return node;
}

PrefixTree::Node* PrefixTree::find(std::span<const int64_t> tokens) const {
  Node* node = last_page(tokens);
  const auto tail = tokens.last(static_cast<size_t>(std::ssize(tokens) % page_tokens_));
  if (node == nullptr || tail.empty()) return node;
  const auto found = node->tails.find(tail);
  return found == node->tails.end() ? nullptr : found->second.get();
}

bool PrefixTree::has_state(std::span<const int64_t> tokens) const {
  const Node* node = find(tokens);
  return node != nullptr && node->has_state();
}

int64_t PrefixTree::insert(std::span<const int64_t> tokens, std::span<int64_t> pages) {
  const int64_t num_full = std::ssize(tokens) / page_tokens_;
  HADAL_CHECK(std::ssize(pages) * page_tokens_ >= std::ssize(tokens), "prefix_tree: ", pages.size(),
              " pages for ", tokens.size(), " tokens");
  Node* node = root_.get();
  int64_t first_new = num_full;
  for (int64_t page = 0; page < num_full; ++page) {
    const auto key =
        tokens.subspan(static_cast<size_t>(page * page_tokens_), static_cast<size_t>(page_tokens_));
    int64_t& mine = pages[static_cast<size_t>(page)];
    const auto found = node->children.find(key);
    if (found == node->children.end()) {
      first_new = std::min(first_new, page);
      node = add(*node, key, mine);
      continue;
    }
    node = found->second.get();
    if (node->page != mine) {
      pool_.share(node->page);
      pool_.release(mine);
      mine = node->page;
    }
  }
  return first_new;
}

// End of the longest tail of `node` that is a proper prefix of `ids` below it; 0: none.
template <typename Ids>
int64_t PrefixTree::tail_before(const Node& node, const Ids& ids) {
  int64_t longest = 0;
  if (node.tails.empty()) return 0;
  for (auto at = node.tails.begin(); at != node.tails.end(); ++at) {
    if (!at->second->has_state() || std::ssize(at->first) >= std::ssize(ids)) continue;
    if (common_prefix(at->first, ids) == std::ssize(at->first))
      longest = std::max(longest, at->second->end());
  }
  return longest;
}

// What the loss of this state costs, and the pages that would go with it.
void PrefixTree::weigh(Node& node) const {
  int64_t before = 0;
  bool alone = is_leaf(node);  // what comes is held for this state only
  node.frees = std::ssize(node.snapshot);
  for (const Node* at = &node; at != root_.get(); at = at->parent) {
    if (at != &node && at->has_state()) {
      before = std::max(before, at->end());
      break;
    }
    const Node& parent = *at->parent;
    if (alone && (at->is_tail || pool_.references(at->page) == 1)) ++node.frees;
    alone = alone && parent.children.size() + parent.tails.size() == 1;
    before = std::max(before, tail_before(parent, at->tokens));
    if (before > 0) break;
  }
  node.cost = node.end() - before;
  node.last = is_leaf(node) && !(node.is_tail && goes_on(node)) && pool_.references(node.page) == 1;
}

// Whether the tree knows how a tail's tokens go on.
bool PrefixTree::goes_on(const Node& tail) {
  const auto begins = [&](const Children& group) {
    const auto next = group.upper_bound(tail.tokens);
    return next != group.end() &&
           common_prefix(tail.tokens, next->first) == std::ssize(tail.tokens);
  };
  return begins(tail.parent->tails) || begins(tail.parent->children);
}

double PrefixTree::worth(const Node& node) const {
  const double against = node.last || node.uses >= 2 ? 1.0 : odds_.against(node.kind);
  const double wait = expected_wait(clock_ - node.last_use, node.interval, usual_interval_);
  return static_cast<double>(node.cost) / (wait * against * static_cast<double>(node.frees));
}

// What keys hold comes last.
PrefixTree::Node* PrefixTree::least_worth() {
  Node* least = nullptr;
  for (int weighing = 0; weighing < kWeighings; ++weighing) {
    std::pair<bool, double> smallest;
    const size_t count = std::min(states_.size(), kCandidates);
    for (size_t i = 0; i < count; ++i) {
      Node* node = states_[(scan_ + i) % states_.size()];
      const std::pair value(node->pins > 0, worth(*node));
      if (i > 0 && value >= smallest) continue;
      smallest = value;
      least = node;
    }
    if (least == nullptr) return nullptr;
    const int64_t cost = least->cost, frees = least->frees;
    const bool last = least->last;
    weigh(*least);
    if (least->cost == cost && least->frees == frees && least->last == last) break;
  }
  scan_ += std::min(states_.size(), kCandidates);
  if (states_.size() <= kCandidates) scan_ = 0;
  return least;
}

bool PrefixTree::evict() {
  for (const auto& [order, node] : stateless_) {
    if (pool_.references(node->page) != 1) continue;
    remove_stateless(*node);
    return true;
  }
  Node* node = least_worth();
  if (node == nullptr) return false;
  ++num_evicted_;
  drop_state(*node);
  remove_stateless(*node);
  return true;
}

bool PrefixTree::make_room(std::span<const int64_t> tokens,
                           StateKind kind,
                           int64_t count,
                           bool pinned) {
  if (pool_.num_free() >= count) return true;
  const Node* parent = last_page(tokens);
  HADAL_CHECK(parent != nullptr, "prefix_tree: a state of unknown pages");
  // As the tree would hold it.
  const auto tail = tokens.last(static_cast<size_t>(std::ssize(tokens) % page_tokens_));
  int64_t before = tail_before(*parent, tail), frees = count + (tail.empty() ? 0 : 1);
  uint64_t interval = parent == root_.get() ? 0 : parent->interval;
  for (const Node* at = parent; at != root_.get() && before == 0; at = at->parent) {
    if (at->has_state()) before = at->end();
    before = std::max(before, tail_before(*at->parent, at->tokens));
    if (before == 0 && kind == StateKind::kEnd && at->children.empty()) ++frees;
  }
  const std::pair value(pinned, static_cast<double>(std::ssize(tokens) - before) /
                                    (expected_wait(0, interval, usual_interval_) *
                                     odds_.against(kind) * static_cast<double>(frees)));
  while (pool_.num_free() < count) {
    const bool has_stateless = std::ranges::any_of(
        stateless_, [&](const auto& entry) { return pool_.references(entry.second->page) == 1; });
    if (!has_stateless) {
      const Node* least = least_worth();
      if (least == nullptr || std::pair(least->pins > 0, worth(*least)) >= value) return false;
    }
    if (!evict()) return false;
  }
  return true;
}

void PrefixTree::keep_state(std::span<const int64_t> tokens,
                            std::span<const int64_t> pages,
                            std::span<const int64_t> snapshot,
                            StateKind kind) {
  Node* node = last_page(tokens);
  HADAL_CHECK(node != nullptr && !snapshot.empty(), "prefix_tree: a state of unknown pages");
  const auto tail = tokens.last(static_cast<size_t>(std::ssize(tokens) % page_tokens_));
  if (!tail.empty()) {
    const auto found = node->tails.find(tail);
    // A page is at most one tail: a second end in it belongs to the same sequence, later.
    const int64_t page = pages[static_cast<size_t>(std::ssize(tokens) / page_tokens_)];
    if (found == node->tails.end() && pool_.in_tree(page)) forget_tail(page);
    node = found == node->tails.end() ? add(*node, tail, page) : found->second.get();
  }
  HADAL_CHECK(node != root_.get() && !node->has_state(), "prefix_tree: a state twice");
  for (const int64_t page : snapshot) {
    pool_.share_with_tree(page);
    pool_.release(page);
  }
  num_snapshot_pages_ += std::ssize(snapshot);
  stateless_.erase({node->order, node});
  node->snapshot.assign(snapshot.begin(), snapshot.end());
  node->lost_state = false;
  node->kind = kind;
  node->uses = 0;
  node->passed = false;
  node->last_use = clock_;
  node->place = states_.size();
  states_.push_back(node);
  weigh(*node);
}

void PrefixTree::pin(const CacheKey& key,
                     std::span<const int64_t> tokens,
                     Pin which,
                     PrefixPins::Clock::time_point now) {
  Node* node = find(tokens);
  if (node != nullptr && node->has_state()) pins_.pin(key, which, node, now);
}

void PrefixTree::use_pinned(const CacheKey& key,
                            const PrefixMatch& match,
                            PrefixPins::Clock::time_point now) {
  const bool again = match.state != nullptr && match.state->uses > 1;
  pins_.pin(key, Pin::kBeginning, again ? match.state : nullptr, now);
}

void PrefixTree::forget_tail(int64_t page) {
  const auto found = tails_.find(page);
  HADAL_CHECK(found != tails_.end(), "prefix_tree: page ", page, " is no tail's");
  Node& node = *found->second;
  drop_state(node);
  remove(node);
}

void PrefixTree::clear() {
  while (!states_.empty()) drop_state(*states_.back());
  while (!stateless_.empty()) remove(*stateless_.begin()->second);
}

void PrefixTree::check_node(const Node& node, std::span<int64_t> expected, Counted& counted) const {
  if (&node != root_.get()) {
    ++counted.nodes;
    HADAL_CHECK(pool_.in_tree(node.page), "prefix_tree: page ", node.page, " is not the tree's");
    ++expected[static_cast<size_t>(node.page)];
    HADAL_CHECK((std::ssize(node.tokens) < page_tokens_) == node.is_tail && !node.tokens.empty() &&
                    node.begin == (node.parent == root_.get() ? 0 : node.parent->end()),
                "prefix_tree: a page of ", node.tokens.size(), " tokens at ", node.begin);
    HADAL_CHECK(node.hash == chain(node.parent->hash, node.tokens), "prefix_tree: hash differs");
    int below = node.pins;
    for (const Children* group : {&node.children, &node.tails})
      for (const auto& [tokens, child] : *group) below += child->pins_below;
    HADAL_CHECK(below == node.pins_below && (node.pins == 0 || node.has_state()),
                "prefix_tree: ", below, " pins, counted ", node.pins_below);
    if (node.pins_below > 0) ++counted.pinned_pages;
    if (node.pins > 0) counted.pinned_pages += std::ssize(node.snapshot);
    if (is_leaf(node) && !node.has_state()) {
      ++counted.stateless;
      HADAL_CHECK(stateless_.contains({node.order, const_cast<Node*>(&node)}),
                  "prefix_tree: a leaf is missing in the order");
    }
    HADAL_CHECK(
        !node.is_tail || (is_leaf(node) && node.has_state() && tails_.at(node.page) == &node),
        "prefix_tree: a tail without state or with children");
    if (node.has_state()) {
      ++counted.states;
      counted.snapshot_pages += std::ssize(node.snapshot);
      HADAL_CHECK(states_.at(node.place) == &node, "prefix_tree: a state is missing in the list");
      for (const int64_t page : node.snapshot) {
        HADAL_CHECK(pool_.in_tree(page) && pool_.references(page) == 1, "prefix_tree: page ", page,
                    " of a state has other holders");
        ++expected[static_cast<size_t>(page)];
      }
    }
  }
  for (const Children* group : {&node.children, &node.tails}) {
    for (const auto& [key, child] : *group) {
      HADAL_CHECK(child->parent == &node && child->tokens.data() == key.data(),
                  "prefix_tree: wrong parent");
      check_node(*child, expected, counted);
    }
  }
}

void PrefixTree::check_integrity(std::span<int64_t> expected) const {
  Counted counted;
  check_node(*root_, expected, counted);
  HADAL_CHECK(counted.nodes == num_nodes_ && counted.snapshot_pages == num_snapshot_pages_ &&
                  counted.states == std::ssize(states_) &&
                  counted.stateless == static_cast<int64_t>(stateless_.size()),
              "prefix_tree: counted ", counted.nodes, " nodes, ", counted.states, " states in ",
              counted.snapshot_pages, " pages, ", counted.stateless, " leaves without");
  HADAL_CHECK(evicted_.size() == evicted_order_.size(), "prefix_tree: evicted prefixes differ");
  HADAL_CHECK(counted.pinned_pages == pins_.num_pages(), "prefix_tree: keys hold ",
              counted.pinned_pages, " pages, counted ", pins_.num_pages());
  pins_.check_integrity();
}

}  // namespace hadal::engine_core
