// The CUDA kernels behind swiglu; free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

struct SwigluParams {
  const void* gate;     ///< [rows, inter] type
  const void* up;       ///< [rows, inter] type
  const float* weight;  ///< [rows], null for the shared expert
  void* out;            ///< [rows, inter] type
  int64_t rows, inter;  ///< inter a multiple of 4
  float limit;
  ElementType type;
};

struct SwigluBackwardParams {
  const void* gate;      ///< [rows, inter] type
  const void* up;        ///< [rows, inter] type
  const float* weight;   ///< [rows], null for the shared expert
  const void* grad_out;  ///< [rows, inter] type
  void* grad_gate;       ///< [rows, inter] type
  void* grad_up;         ///< [rows, inter] type
  float* grad_weight;    ///< [rows], null without weight
  int64_t rows, inter;   ///< inter a multiple of 4
  float limit;
  ElementType type;
};

extern KernelSlot<void(const SwigluParams&, Stream)> swiglu_cuda;
extern KernelSlot<void(const SwigluBackwardParams&, Stream)> swiglu_backward_cuda;

}  // namespace hadal::ops
