// Heads of attention on Hopper before and after it, as functions of pointers, with the bits of the
// CPU's kernels (rms_norm.h, rope.h). Free of ATen.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

/// Heads of attention: the released per-head norm, if asked for, and the rotation of the last 64
/// channels, forward or back.
struct HeadRowsSm90Params {
  const uint16_t* x;             ///< [tokens, heads, width] BF16
  const float* cos_sin;          ///< [tokens, 32, 2]
  uint16_t* out;                 ///< as x; may be x
  int64_t tokens, heads, width;  ///< width: 64, 128, 256 or 512
  float eps;
  bool norm, inverse;
};
void head_rows_sm90(const HeadRowsSm90Params& p, Stream stream);
void head_rows_twin(const HeadRowsSm90Params& p);  ///< the same on a CPU

/// Results of attention, rotated back, as operands of the grouped output projection: group g's has
/// the heads [g, g + 1) * heads / groups as its K.
struct HeadOperandSm90Params {
  const uint16_t* x;     ///< [tokens, heads, width] BF16
  const float* cos_sin;  ///< [tokens, 32, 2]
  uint8_t* operand;      ///< groups K-major operands (sm90_layout.h) of x_groups row groups each
  int64_t tokens, heads, width;  ///< width: 64, 128, 256 or 512
  int64_t groups, x_groups;      ///< x_groups * 8 >= tokens; rows from `tokens` on become zero
};
void head_operand_sm90(const HeadOperandSm90Params& p, Stream stream);
void head_operand_twin(const HeadOperandSm90Params& p);  ///< the same on a CPU

}  // namespace hadal::ops
