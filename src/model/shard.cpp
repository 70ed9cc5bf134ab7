#include "model/shard.h"

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::model {

Shard Shard::even(int64_t axis, int64_t size, int64_t part, int64_t parts) {
  HADAL_CHECK(parts > 0 && part >= 0 && part < parts && size % parts == 0, "shard: part ", part,
              " of ", parts, " of ", size, " elements");
  return {.axis = axis,
          .part = part,
          .parts = parts,
          .offset = size / parts * part,
          .length = size / parts};
}

std::vector<int64_t> Shard::of(std::vector<int64_t> shape) const {
  if (whole()) return shape;
  HADAL_CHECK(axis >= 0 && axis < std::ssize(shape), "shard: axis ", axis, " of ", shape.size());
  int64_t& size = shape[static_cast<size_t>(axis)];
  HADAL_CHECK(part >= 0 && part < parts && offset >= 0 && length > 0 && offset + length <= size,
              "shard: part ", part, " of ", parts, ", elements ", offset, " to ", offset + length,
              " of ", size);
  size = length;
  return shape;
}

at::Tensor Shard::of(const at::Tensor& whole_tensor) const {
  if (whole()) return whole_tensor;
  of(whole_tensor.sizes().vec());
  return whole_tensor.narrow(axis, offset, length);
}

}  // namespace hadal::model
