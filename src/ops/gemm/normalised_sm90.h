// RMSNorm whose results are operands of products, too, on Hopper: as a function of pointers, with
// the bits of rms_norm_sm90 and then of quantise_operand_sm90 and bf16_operand_sm90. Free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

struct NormalisedSm90Params {
  const void* x;        ///< [rows, dim] BF16
  const float* weight;  ///< [dim]
  void* out;            ///< [rows, dim] BF16
  int64_t rows, dim;    ///< dim: a multiple of 128, 16,384 at most
  float eps;
  uint8_t* codes;    ///< E4M3 by Q8_128: K-major operand of x_groups row groups; or null
  float* scales;     ///< [dim / 128, 8 * x_groups]; null with codes
  uint8_t* operand;  ///< BF16: K-major operand of as many; or null
  int64_t x_groups;  ///< operands' rows from `rows` on become zero
};
void normalised_sm90(const NormalisedSm90Params& p, Stream stream);

}  // namespace hadal::ops
