// Which rank holds a parameter's optimizer state and moves it (docs/parallelism.md).
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "model/transformer.h"

namespace hadal::train {

/// Bytes of optimizer state a rank holds.
struct StateLoad {
  int64_t most = 0, total = 0;
};

class Ownership {
 public:
  /// One rank owns all.
  Ownership() = default;
  /// Whole parameters, so that no matrix is cut: the largest first, each to the rank that holds
  /// least so far, the lowest of equals. A function of the model and the number of ranks.
  Ownership(const model::Transformer& model, int64_t ranks, int64_t rank);

  /// `index` counts the parameters that take a gradient, in the model's order.
  int64_t owner(size_t index) const { return owners_.empty() ? 0 : owners_[index]; }
  bool here(size_t index) const { return owner(index) == rank_; }
  const StateLoad& load() const { return load_; }
  /// The parameters among `indices` (ascending) by what travels in one message: large ones alone,
  /// small ones of one owner together. The same on every rank.
  std::vector<std::vector<size_t>> bundles(const std::vector<size_t>& indices,
                                           const std::vector<int64_t>& bytes) const;

 private:
  std::vector<int64_t> owners_;
  int64_t rank_ = 0;
  StateLoad load_;
};

/// Tensors of a bundle as one, and one of their total size as views of them; alone, itself.
at::Tensor bundled(const std::vector<at::Tensor>& tensors);
std::vector<at::Tensor> unbundled(const at::Tensor& bundle, const std::vector<at::Tensor>& like);

/// Loads of `ranks` buckets for items of these sizes, and the bucket of each: longest processing
/// time first.
std::vector<int64_t> fill_buckets(const std::vector<int64_t>& sizes,
                                  int64_t ranks,
                                  std::vector<int64_t>& loads);

}  // namespace hadal::train
