// The CUDA kernel behind rope; free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

struct RopeParams {
  const void* x;               ///< [tokens, heads, dim] type
  const float* cos_sin;        ///< [tokens, rope_dim / 2, 2]
  void* out;                   ///< [tokens, heads, dim] type
  int64_t tokens, heads, dim;  ///< dim even
  int64_t rope_dim;            ///< the last channels of dim, even
  bool inverse;
  ElementType type;
};

extern KernelSlot<void(const RopeParams&, Stream)> rope_cuda;

}  // namespace hadal::ops
