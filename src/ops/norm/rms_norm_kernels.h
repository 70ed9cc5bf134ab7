// The CUDA kernels behind rms_norm and head_norm; free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

struct RmsNormParams {
  const void* x;        ///< [rows, dim] type
  const float* weight;  ///< [dim], null for the weightless norm
  void* out;            ///< [rows, dim] type
  float* rstd;          ///< [rows]
  int64_t rows, dim;    ///< dim a multiple of 4
  float eps;
  bool released;  ///< round every intermediate to `type`; weight is null
  ElementType type;
};

struct RmsNormBackwardParams {
  const void* x;         ///< [rows, dim] type
  const float* weight;   ///< [dim], null for the weightless norm
  const float* rstd;     ///< [rows]
  const void* grad_out;  ///< [rows, dim] type
  void* grad_x;          ///< [rows, dim] type
  float* parts;          ///< [num_parts, dim], null without weight
  float* grad_weight;    ///< [dim], null without weight
  int64_t rows, dim, num_parts;
  ElementType type;
};

extern KernelSlot<void(const RmsNormParams&, Stream)> rms_norm_cuda;
extern KernelSlot<void(const RmsNormBackwardParams&, Stream)> rms_norm_backward_cuda;

}  // namespace hadal::ops
