// CPU kernel contract of rope (rope.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

struct RopeCpuParams {
  const void* x;         ///< [tokens, heads, dim]
  void* out;             ///< [tokens, heads, dim], x's dtype
  const float* cos_sin;  ///< [tokens, rope_dim / 2, 2]
  int64_t heads, dim, rope_dim;
  ElementType dtype;
  bool inverse;
};

/// Tokens [begin, end).
extern CpuSlot<void(const RopeCpuParams&, int64_t, int64_t)> rope_cpu;

}  // namespace hadal::ops
