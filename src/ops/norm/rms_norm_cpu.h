// CPU kernel contract of the norms (rms_norm.h). Rows are independent: any split over threads gives
// the same bits.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

struct RmsNormCpuParams {
  const void* x;        ///< [rows, dim]
  const float* weight;  ///< [dim]; null: none
  void* out;            ///< [rows, dim], x's dtype
  int64_t dim;
  float eps;
  ElementType dtype;
  bool bf16_chain;  ///< the released per-head norm: every intermediate rounded to BF16
};

/// Rows [begin, end).
extern CpuSlot<void(const RmsNormCpuParams&, int64_t, int64_t)> rms_norm_cpu;

}  // namespace hadal::ops
