// A tensor of integers as numbers, for tests that compare tables.
#pragma once

#include <cstdint>
#include <vector>

#include <ATen/ATen.h>

namespace hadal::testing {

inline std::vector<int64_t> numbers_of(const at::Tensor& x) {
  const at::Tensor y = x.to(at::kLong).contiguous();
  return {y.const_data_ptr<int64_t>(), y.const_data_ptr<int64_t>() + y.numel()};
}

}  // namespace hadal::testing
