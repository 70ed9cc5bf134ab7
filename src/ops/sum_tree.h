// The binary tree over numbered leaves by which sums over tokens are taken
// (docs/decisions/0018-sums-over-tokens.md).
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "base/check.h"

namespace hadal::ops {

/// Places of one chunk of a sum over tokens.
inline constexpr int64_t kSumChunk = 128;
/// The sum of no leaf. Added to any number it leaves its bits, which +0 does not: a leaf may be -0.
inline constexpr float kNoSum = -0.0f;

/// Leaves in ascending order become a schedule of a stack: after a leaf is pushed, the top two
/// entries are added `merges` times.
///
/// The tree is the one whose node at level l and index i covers the leaves from i 2^l to
/// (i + 1) 2^l - 1: two present leaves meet at the level of the highest bit in which their numbers
/// differ. Leaves that are absent add nothing, not even a zero.
class SumSchedule {
 public:
  /// Numbers ascending, each once.
  void add(uint64_t number) {
    if (!merges_.empty()) join_below(static_cast<int>(std::bit_width(number ^ last_)));
    last_ = number;
    merges_.push_back(0);
    most_ = most_ < heights_.size() + 1 ? heights_.size() + 1 : most_;
  }
  /// After the last one; `merges` are complete from here on.
  void finish() { join_below(65); }

  const std::vector<int32_t>& merges() const { return merges_; }
  /// Entries that the stack holds at most.
  int64_t depth() const { return static_cast<int64_t>(most_); }

 private:
  /// Joins what meets below the level at which the next leaf meets the top; remembers that level.
  void join_below(int level) {
    if (merges_.empty()) return;
    while (!heights_.empty() && heights_.back() < level) {
      heights_.pop_back();
      ++merges_.back();
    }
    if (level < 65) heights_.push_back(level);
  }

  std::vector<int32_t> merges_;
  std::vector<int> heights_;  ///< levels at which neighbours on the stack meet, descending
  uint64_t last_ = 0;
  size_t most_ = 0;
};

/// Consecutive rows of one chunk, and how often sums are joined behind them.
struct ChunkRun {
  int64_t begin = 0, end = 0;
  int32_t merges = 0;
};

/// The leaves of a sum over rows; places [rows], not descending, null: 0, 1, ...
inline std::vector<ChunkRun> chunk_runs(int64_t rows, const int64_t* places) {
  const auto chunk = [&](int64_t row) {
    return (places != nullptr ? places[row] : row) / kSumChunk;
  };
  std::vector<ChunkRun> runs;
  SumSchedule schedule;
  for (int64_t row = 0; row < rows;) {
    int64_t next = row + 1;
    while (next < rows && chunk(next) == chunk(row)) ++next;
    HADAL_CHECK(next == rows || chunk(next) > chunk(row), "sum: places descend at row ", next);
    schedule.add(static_cast<uint64_t>(chunk(row)));
    runs.push_back({.begin = row, .end = next});
    row = next;
  }
  schedule.finish();
  for (size_t i = 0; i < runs.size(); ++i) runs[i].merges = schedule.merges()[i];
  return runs;
}

/// The sum of count values, one a place: ascending from zero inside a chunk, chunks by the tree.
inline float tree_sum(const float* values, int64_t count) {
  SumSchedule schedule;
  for (int64_t chunk = 0; chunk * kSumChunk < count; ++chunk)
    schedule.add(static_cast<uint64_t>(chunk));
  schedule.finish();
  std::vector<float> stack;
  for (size_t chunk = 0; chunk < schedule.merges().size(); ++chunk) {
    const int64_t begin = static_cast<int64_t>(chunk) * kSumChunk;
    const int64_t end = begin + kSumChunk < count ? begin + kSumChunk : count;
    float sum = 0.0f;
    for (int64_t i = begin; i < end; ++i) sum += values[i];
    for (int32_t merge = 0; merge < schedule.merges()[chunk]; ++merge) {
      sum = stack.back() + sum;
      stack.pop_back();
    }
    stack.push_back(sum);
  }
  return stack.empty() ? kNoSum : stack.back();
}

}  // namespace hadal::ops
