// The formats in which official checkpoints store weights (model.md 14.1, 14.4, 14.6): their values
// and their codes.
//
//   FP8  E4M3 with one power-of-two scale per 128x128 block
//   FP4  E2M1 with one power-of-two scale per 1x32 block of inputs
#pragma once

#include <ATen/core/Tensor.h>

namespace hadal::ops {

/// How the official checkpoint stores a parameter.
enum class OfficialStorage { kFp8, kFp4, kBf16, kF32, kI64 };

/// The values that FP8 or FP4 storage would hold, in BF16; of other storage w itself in BF16.
///   w  [..., out, in] of any float type on any device; FP8 blocks begin anew with each matrix only
///      where out is a multiple of 128 (stacked rows form one matrix)
at::Tensor official_rounding(const at::Tensor& w, OfficialStorage storage);

/// A matrix in codes.
struct StoredCodes {
  at::Tensor data;   ///< FP8: [out, in] kFloat8_e4m3fn; FP4: [out, in / 2] kChar, even input low
  at::Tensor scale;  ///< E8M0 bytes (kByte): [ceil(out / 128), ceil(in / 128)] or [out, in / 32]
};
/// The codes whose values are official_rounding(w), bit for bit.
///   w  [out, in], finite; FP4: in divisible by 32
StoredCodes official_codes(const at::Tensor& w, OfficialStorage storage);

}  // namespace hadal::ops
