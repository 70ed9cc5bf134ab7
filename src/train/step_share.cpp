#include "train/step_share.h"

#include <algorithm>

#include "base/check.h"

namespace hadal::train {

Span row_share(int64_t rows, int64_t ranks, int64_t rank) {
  HADAL_CHECK(rows >= 0 && ranks >= 1 && rank >= 0 && rank < ranks, "row_share: rank ", rank,
              " of ", ranks, " for ", rows, " rows");
  const int64_t each = (rows + ranks - 1) / ranks;
  return {std::min(rows, rank * each), std::min(rows, (rank + 1) * each)};
}

bool spans_meet(const Span& left, const Span& right, int64_t leaves) {
  const int64_t half = left.size();
  if ((half & (half - 1)) != 0 || left.begin % (2 * half) != 0) return false;
  return right.size() == half || (right.size() < half && right.end == leaves);
}

std::vector<Span> nodes_of(const Span& span, int64_t leaves) {
  struct Node {
    Span span;
  };
  std::vector<Node> nodes;
  for (int64_t leaf = span.begin; leaf < span.end; ++leaf) {
    nodes.push_back({{leaf, leaf + 1}});
    join_meeting(nodes, leaves, [](const Node&, const Node&) {});
  }
  std::vector<Span> result;
  for (const Node& node : nodes) result.push_back(node.span);
  return result;
}

}  // namespace hadal::train
