// CPU kernel contract of SwiGLU's gradient (swiglu.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

struct SwigluBackwardCpuParams {
  const void *gate, *up, *grad_out;  ///< [rows, inter]
  const float* weight;               ///< [rows]; null: none
  void *grad_gate, *grad_up;         ///< [rows, inter]
  float* grad_weight;                ///< [rows]; null: none
  int64_t inter;
  float limit;
  ElementType dtype;
};

/// Rows [begin, end).
extern CpuSlot<void(const SwigluBackwardCpuParams&, int64_t, int64_t)> swiglu_backward_cpu;

}  // namespace hadal::ops
