// Which rows of a step a rank takes, and which nodes of the step's tree it therefore holds
// (docs/decisions/0018-sums-over-tokens.md, docs/decisions/0023-ranks.md).
#pragma once

#include <cstdint>
#include <vector>

namespace hadal::train {

/// Leaves [begin, end) of a sum.
struct Span {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const Span&) const = default;
};

/// A rank's rows: ceil(rows / ranks) for each in turn, fewer or none for the last ones. Any number
/// of rows on any number of ranks.
Span row_share(int64_t rows, int64_t ranks, int64_t rank);

/// Whether two neighbours are the halves of one node of the tree over `leaves` leaves. The left one
/// must be a node; the right one may be short only where the leaves end.
bool spans_meet(const Span& left, const Span& right, int64_t leaves);

/// The fewest nodes of the tree over `leaves` leaves that make up a span of it, in order: at most 2
/// log2(leaves) of them, one where the span is a subtree.
std::vector<Span> nodes_of(const Span& span, int64_t leaves);

/// Adds neighbours as far as they meet, newest first. `Nodes` is a vector of what has a `span`;
/// join(left, right) adds the right one to the left one's sums.
template <typename Nodes, typename Join>
void join_meeting(Nodes& nodes, int64_t leaves, const Join& join) {
  while (nodes.size() > 1) {
    auto& left = nodes[nodes.size() - 2];
    auto& right = nodes.back();
    if (!spans_meet(left.span, right.span, leaves)) return;
    join(left, right);
    left.span.end = right.span.end;
    nodes.pop_back();
  }
}

}  // namespace hadal::train
