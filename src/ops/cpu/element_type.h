// Element types that the CPU kernels read and write.
#pragma once

#include <cstdint>

namespace hadal::ops {

enum class ElementType : int32_t { kF32, kBf16 };

}  // namespace hadal::ops
