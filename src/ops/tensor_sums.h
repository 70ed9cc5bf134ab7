// Tensors added by the tree of their numbers (sum_tree.h).
#pragma once

#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/check.h"
#include "ops/sum_tree.h"

namespace hadal::ops {

/// Leaves 0, 1, 2, ... of one shape, each in memory of its own; holds about log2 of their number.
class TensorSums {
 public:
  void add(at::Tensor leaf) {
    stack_.push_back(std::move(leaf));
    ++leaves_;
    for (int level = std::countr_zero(leaves_); level > 0; --level) join();
  }
  /// The sum of all; Error where there is none.
  at::Tensor finish() {
    HADAL_CHECK(!stack_.empty(), "sum of no tensors");
    while (stack_.size() > 1) join();
    return std::move(stack_.front());
  }

 private:
  void join() {
    const at::Tensor right = std::move(stack_.back());
    stack_.pop_back();
    stack_.back().add_(right);
  }
  std::vector<at::Tensor> stack_;
  uint64_t leaves_ = 0;
};

/// The sum of leaves with these numbers, ascending, by the tree of sum_tree.h, in their memory;
/// undefined where there is none.
inline at::Tensor sum_by_number(const std::vector<uint64_t>& numbers,
                                std::vector<at::Tensor> leaves) {
  SumSchedule schedule;
  for (const uint64_t number : numbers) schedule.add(number);
  schedule.finish();
  std::vector<at::Tensor> stack;
  for (size_t i = 0; i < leaves.size(); ++i) {
    stack.push_back(std::move(leaves[i]));
    for (int32_t merge = 0; merge < schedule.merges()[i]; ++merge) {
      const at::Tensor right = std::move(stack.back());
      stack.pop_back();
      stack.back().add_(right);
    }
  }
  return stack.empty() ? at::Tensor() : std::move(stack.front());
}

}  // namespace hadal::ops
