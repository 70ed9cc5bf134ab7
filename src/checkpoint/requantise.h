// Dense values back to FP8 and FP4 codes without changing them, where that is possible.
#pragma once

#include <optional>
#include <string>

#include <ATen/core/Tensor.h>

#include "checkpoint/names.h"
#include "checkpoint/quantise.h"

namespace hadal::checkpoint {

/// What a stored matrix stands for: FP8 and FP4 dequantised to FP32, anything else as it is.
at::Tensor dense_values(const at::Tensor& data, const at::Tensor& scale);

/// The codes of w [out, in] BF16 under these scales: FP8 with one E8M0 byte or F32 a 128 x 128
/// block, or FP4 with one E8M0 byte per 32 inputs, told apart by the shape of `scale`. Nothing
/// unless they stand for w, bit for bit.
std::optional<ops::StoredCodes> requantise(const at::Tensor& w, const at::Tensor& scale);

/// The same with E8M0 scales to be found, for Storage::kFp8 or kFp4: those of the official rounding
/// if they fit, else the smallest that do.
std::optional<ops::StoredCodes> requantise(const at::Tensor& w,
                                           Storage storage,
                                           const std::string& name);

}  // namespace hadal::checkpoint
