// Tensors added by the tree of their numbers (sum_tree.h).
#pragma once

#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "base/check.h"

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

}  // namespace hadal::ops
