// The part of a parameter that one process holds.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hadal::model {

/// Elements [offset, offset + length) of one axis, part `part` of `parts`; the default is the
/// whole. Rows (axis 0) serve ZeRO, the first axis of stacked experts expert parallelism.
struct Shard {
  int64_t axis = 0;
  int64_t part = 0, parts = 1;
  int64_t offset = 0, length = 0;  ///< elements of the axis; unused of a whole

  /// Equal parts of an axis of `size` elements; Error unless `parts` divides it.
  static Shard even(int64_t axis, int64_t size, int64_t part, int64_t parts);

  bool whole() const { return parts == 1; }
  /// What is left of a shape. Error where the shard does not lie inside it.
  std::vector<int64_t> of(std::vector<int64_t> shape) const;
  /// Its elements of the whole tensor: a view.
  at::Tensor of(const at::Tensor& whole_tensor) const;
  bool operator==(const Shard&) const = default;
};

}  // namespace hadal::model
