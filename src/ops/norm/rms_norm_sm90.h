// RMSNorm on Hopper with the bits of the CPU kernel (rms_norm_cpu.h), as a function of pointers.
// Free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

struct RmsNormSm90Params {
  const void* x;        ///< [rows, dim] BF16
  const float* weight;  ///< [dim]; null: none
  void* out;            ///< [rows, dim] BF16
  int64_t rows, dim;    ///< dim: one that serves_rms_norm_sm90() takes
  float eps;
  bool bf16_chain;  ///< the released per-head norm: every intermediate rounded to BF16
};
/// Whether there is a kernel for rows of `dim` values.
inline bool serves_rms_norm_sm90(int64_t dim) { return dim % 8 == 0 && dim <= 16384; }
void rms_norm_sm90(const RmsNormSm90Params& p, Stream stream);
/// The same on a CPU.
void rms_norm_twin(const RmsNormSm90Params& p);

}  // namespace hadal::ops
