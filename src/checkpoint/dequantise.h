// Stored matrices to dense values, exactly (model.md 14.1, 14.4).
#pragma once

#include <ATen/core/Tensor.h>

namespace hadal::checkpoint {

/// 2^(b - 127) for E8M0 bytes, b = 0 being the FP32 subnormal 2^-127. FP32, same shape; 255 (NaN)
/// stays NaN.
at::Tensor e8m0_to_float(const at::Tensor& bytes);

/// FP8 with one scale per 128 x 128 block: data [out, in] kFloat8_e4m3fn, scale [ceil(out / 128),
/// ceil(in / 128)] E8M0 bytes or FP32. The result is FP32 [out, in]; with power-of-two scales every
/// value is exact in BF16 too.
at::Tensor dequantise_fp8(const at::Tensor& data, const at::Tensor& scale);

/// FP4 packed two to a byte, the even element in the low nibble, with one E8M0 scale per 32 inputs:
/// data [out, in / 2], scale [out, in / 32]. The result is FP32 [out, in] and exact in BF16.
at::Tensor dequantise_fp4(const at::Tensor& data, const at::Tensor& scale);

}  // namespace hadal::checkpoint
