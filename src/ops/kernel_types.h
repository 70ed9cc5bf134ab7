// What host code and kernels share: element types and the way a kernel reports a failed launch.
// Free of ATen, so that .cu files can include it.
#pragma once

#include <cstdint>

#include "base/fwd.h"
#include "base/kernel_slot.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

/// Throws hadal::Error naming the kernel and CUDA's message.
[[noreturn]] void throw_kernel_error(const char* kernel, const char* message);

}  // namespace hadal::ops
