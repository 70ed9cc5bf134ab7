// Matrices as checkpoints store them to the layouts of sm90_layout.h, on the device that holds
// them: what sm90_pack.h makes on the host, at the speed of memory. Functions of pointers, free of
// ATen; the twins do the same on a CPU.
#pragma once

#include "ops/kernel_types.h"

namespace hadal::ops {

/// FP4: sm90_matrices.h says which scales have no exact form; `inexact` becomes 1 for them.
struct PackFp4Sm90Params {
  const uint8_t* codes;          ///< [matrices, outputs, in / 2] the even element low
  const uint8_t* scales;         ///< [matrices, outputs, in / 32] E8M0
  int64_t matrices, outputs, in; /* in: a multiple of 32 */
  uint8_t* tiles;                ///< [matrices, fp4_bytes(outputs, in)]
  int32_t* inexact;              ///< [1]
};
void pack_fp4_sm90(const PackFp4Sm90Params& p, Stream stream);
void pack_fp4_twin(const PackFp4Sm90Params& p);

/// K-major operands of rows of bytes: FP8 and BF16 weights.
struct PackOperandSm90Params {
  const uint8_t* rows;        /// [matrices, outputs, row_bytes], aligned to 16 bytes
  int64_t matrices, outputs;  ///< outputs: any; the operand has whole tiles of 64
  int64_t row_bytes;          ///< a multiple of 16
  uint8_t* operand;           ///< [matrices][slabs][row groups][8][128]
};
void pack_operand_sm90(const PackOperandSm90Params& p, Stream stream);
void pack_operand_twin(const PackOperandSm90Params& p);

/// Tiles of E4M3 that products widen.
struct PackWidenedSm90Params {
  const uint8_t* codes;           ///< [matrices, outputs, in] E4M3
  int64_t matrices, outputs, in;  ///< outputs: a multiple of 64, in: of 128
  uint8_t* tiles;                 ///< [matrices, outputs * in]
};
void pack_widened_sm90(const PackWidenedSm90Params& p, Stream stream);
void pack_widened_twin(const PackWidenedSm90Params& p);

/// Scales of FP8 blocks of 128 x 128 as FP32; 1 for blocks of zeros, which do with any scale.
struct PackScalesSm90Params {
  const uint8_t* codes;   ///< [matrices, outputs, in] E4M3
  const uint8_t* scales;  ///< [matrices, ceil(outputs / 128), ceil(in / 128)] E8M0
  int64_t matrices, outputs, in;
  int32_t most;      ///< E8M0 byte of the largest scale that has an exact form
  float* out;        ///< [matrices, ceil(in / 128), ceil(outputs / 128)]
  int32_t* inexact;  ///< [1]
};
void pack_scales_sm90(const PackScalesSm90Params& p, Stream stream);
void pack_scales_twin(const PackScalesSm90Params& p);

}  // namespace hadal::ops
