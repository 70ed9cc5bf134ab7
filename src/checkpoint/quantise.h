// Dense values to the official storage formats (model.md 14.1, 14.6): the inverse of dequantise.h.
#pragma once

#include <string>

#include <ATen/core/Tensor.h>

namespace hadal::checkpoint {

struct QuantisedTensor {
  at::Tensor data;   ///< FP8: [out, in] kFloat8_e4m3fn; FP4: [out, in / 2] kChar, even input low
  at::Tensor scale;  ///< E8M0 bytes (kByte): [ceil(out / 128), ceil(in / 128)] or [out, in / 32]
};

/// The codes whose values are model::official_rounding(w), bit for bit. w [out, in] of any float
/// type on any device; the result lies on the CPU. A value that is not finite is an InputError that
/// names the tensor.
QuantisedTensor quantise_fp8(const at::Tensor& w, const std::string& name);
/// in must be divisible by 32.
QuantisedTensor quantise_fp4(const at::Tensor& w, const std::string& name);

}  // namespace hadal::checkpoint
