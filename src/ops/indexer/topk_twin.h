// The choice of blocks on a CPU, for the twins.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace hadal::ops {

/// The min(k, scores) blocks of the largest scores, ties to the lower block, NaN lowest, in
/// ascending order; then -1.
inline void choose_blocks(std::vector<float> scores, int64_t k, int32_t* blocks) {
  for (float& score : scores) score = std::isnan(score) ? -INFINITY : score;
  std::vector<int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  const int64_t taken = std::min<int64_t>(k, std::ssize(order));
  std::partial_sort(order.begin(), order.begin() + taken, order.end(), [&](int32_t a, int32_t b) {
    const float x = scores[static_cast<size_t>(a)], y = scores[static_cast<size_t>(b)];
    return x > y || (x == y && a < b);
  });
  std::sort(order.begin(), order.begin() + taken);
  std::copy_n(order.begin(), taken, blocks);
  std::fill(blocks + taken, blocks + k, -1);
}

}  // namespace hadal::ops
