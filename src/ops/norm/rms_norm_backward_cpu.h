// CPU kernel contract of the norm's gradient (rms_norm.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

struct RmsNormBackwardCpuParams {
  const void *x, *grad_out;  ///< [rows, dim]
  const float* weight;       ///< [dim]; null: ones
  void* grad_x;              ///< [rows, dim]
  float* grad_weight;        ///< [dim] sum over the rows of the call, ascending from 0; null: none
  int64_t dim;
  float eps;
  ElementType dtype;
};

/// Rows [begin, end).
extern CpuSlot<void(const RmsNormBackwardCpuParams&, int64_t, int64_t)> rms_norm_backward_cpu;

}  // namespace hadal::ops
