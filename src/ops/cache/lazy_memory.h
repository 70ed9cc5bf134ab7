// Host memory that the system gives when it is first written.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace hadal::ops {

/// Zeros [rows, columns] on the CPU, aligned to 64 bytes: room for the longest context that costs
/// what is used of it. Errors: Error where the system has no such room.
at::Tensor lazy_zeros(int64_t rows, int64_t columns, at::ScalarType type);

}  // namespace hadal::ops
