#include "text/bpe.h"

#include <algorithm>
#include <queue>

#include "base/check.h"

namespace hadal::text {
namespace {

// Up to here scanning for the lowest rank beats a heap.
constexpr size_t kShortPiece = 48;

}  // namespace

Bpe::Bpe(const std::array<int32_t, 256>& byte_ids, std::span<const Merge> merges)
    : byte_ids_(byte_ids) {
  HADAL_CHECK(merges.size() < INT32_MAX / 4, "bpe: ", merges.size(), " merges");
  const size_t capacity = std::bit_ceil(std::max<size_t>(16, merges.size() * 2));
  shift_ = 64 - std::countr_zero(capacity);
  slots_.resize(capacity);
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const uint64_t pair = pair_of(merges[rank].left, merges[rank].right);
    size_t slot = slot_of(pair);
    while (slots_[slot].pair != kEmpty) {
      HADAL_INPUT_CHECK(slots_[slot].pair != pair, "bpe: merges ", slots_[slot].rank, " and ", rank,
                        " are the same pair");
      slot = (slot + 1) & (capacity - 1);
    }
    slots_[slot] = {pair, static_cast<int32_t>(rank), merges[rank].result};
  }
}

Bpe::Slot Bpe::find(int32_t left, int32_t right) const {
  const uint64_t pair = pair_of(left, right);
  size_t slot = slot_of(pair);
  while (slots_[slot].pair != pair && slots_[slot].pair != kEmpty)
    slot = (slot + 1) & (slots_.size() - 1);
  return slots_[slot];
}

void Bpe::encode(std::string_view piece,
                 std::vector<int32_t>& ids,
                 std::vector<int32_t>* applied) const {
  if (piece.size() > kShortPiece) return merge_long(piece, ids, applied);
  int32_t symbols[kShortPiece];
  for (size_t i = 0; i < piece.size(); ++i) symbols[i] = byte_ids_[static_cast<uint8_t>(piece[i])];
  merge_short({symbols, piece.size()}, ids, applied);
}

void Bpe::merge_short(std::span<int32_t> symbols,
                      std::vector<int32_t>& ids,
                      std::vector<int32_t>* applied) const {
  Slot pairs[kShortPiece];  // pairs[i]: the merge of symbols i and i + 1
  size_t count = symbols.size();
  for (size_t i = 0; i + 1 < count; ++i) pairs[i] = find(symbols[i], symbols[i + 1]);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (pairs[i].rank < pairs[best].rank) best = i;
    }
    if (pairs[best].rank == kNoRank) break;
    if (applied != nullptr) applied->push_back(pairs[best].rank);
    symbols[best] = pairs[best].result;
    --count;
    for (size_t i = best + 1; i < count; ++i) symbols[i] = symbols[i + 1];
    for (size_t i = best; i + 1 < count; ++i) pairs[i] = pairs[i + 1];
    if (best > 0) pairs[best - 1] = find(symbols[best - 1], symbols[best]);
    if (best + 1 < count) pairs[best] = find(symbols[best], symbols[best + 1]);
  }
  ids.insert(ids.end(), symbols.begin(), symbols.begin() + static_cast<std::ptrdiff_t>(count));
}

void Bpe::merge_long(std::string_view piece,
                     std::vector<int32_t>& ids,
                     std::vector<int32_t>* applied) const {
  struct Node {
    int32_t id;
    size_t previous;
    size_t next;
    int32_t rank;  ///< of the merge with the next symbol; kNoRank once this node is gone
  };
  struct Candidate {
    int32_t rank;
    size_t left;
    int32_t result;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };
  constexpr size_t kNone = SIZE_MAX;
  std::vector<Node> nodes(piece.size());
  std::vector<Candidate> first;
  for (size_t i = 0; i < piece.size(); ++i) {
    nodes[i] = {byte_ids_[static_cast<uint8_t>(piece[i])], i == 0 ? kNone : i - 1,
                i + 1 == piece.size() ? kNone : i + 1, kNoRank};
  }
  const auto candidate_at = [&](size_t left) -> Candidate {
    Node& node = nodes[left];
    if (node.next == kNone) {
      node.rank = kNoRank;
      return {kNoRank, left, 0};
    }
    const Slot found = find(node.id, nodes[node.next].id);
    node.rank = found.rank;
    return {found.rank, left, found.result};
  };
  for (size_t i = 0; i < nodes.size(); ++i) {
    if (const Candidate c = candidate_at(i); c.rank != kNoRank) first.push_back(c);
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue(std::greater<>(),
                                                                               std::move(first));
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    // A rank names one pair, so an equal rank means that the pair still stands here.
    Node& node = nodes[top.left];
    if (node.rank != top.rank) continue;
    if (applied != nullptr) applied->push_back(top.rank);
    Node& gone = nodes[node.next];
    gone.rank = kNoRank;
    node.id = top.result;
    node.next = gone.next;
    if (node.next != kNone) nodes[node.next].previous = top.left;
    if (const Candidate c = candidate_at(top.left); c.rank != kNoRank) queue.push(c);
    if (node.previous != kNone) {
      if (const Candidate c = candidate_at(node.previous); c.rank != kNoRank) queue.push(c);
    }
  }
  for (size_t i = 0; i != kNone; i = nodes[i].next) ids.push_back(nodes[i].id);
}

}  // namespace hadal::text
