// RMSNorm on Hopper with the bits of the CPU kernel (rms_norm_cpu.h), as a function of pointers.
// Free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

struct RmsNormSm90Params {
  const void* x;        ///< [rows, dim] BF16
  const float* weight;  ///< [dim]; null: none
  void* out;            ///< [rows, dim] BF16
  int64_t rows, dim;    ///< dim: a multiple of 8, at most 16,384
  float eps;
  bool bf16_chain;  ///< the released per-head norm: every intermediate rounded to BF16
};
void rms_norm_sm90(const RmsNormSm90Params& p, Stream stream);

}  // namespace hadal::ops
