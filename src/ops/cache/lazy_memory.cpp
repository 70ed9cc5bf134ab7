#include "ops/cache/lazy_memory.h"

#include <cstdlib>
#include <memory>

#include <ATen/ATen.h>

#include "base/check.h"

namespace hadal::ops {

at::Tensor lazy_zeros(int64_t rows, int64_t columns, at::ScalarType type) {
  constexpr size_t kAlignment = 64;  // a cache line, as ATen's own memory
  const auto bytes =
      static_cast<size_t>(rows * columns) * static_cast<size_t>(c10::elementSize(type));
  size_t space = bytes + kAlignment;
  void* const memory = std::calloc(space, 1);
  HADAL_CHECK(memory != nullptr, "lazy_memory: no memory of ", bytes, " bytes");
  void* first = memory;
  std::align(kAlignment, bytes, first, space);
  return at::from_blob(
      first, {rows, columns}, [memory](void*) { std::free(memory); }, type);
}

}  // namespace hadal::ops
