// Dense values to the official storage formats (model.md 14.1, 14.6): the inverse of dequantise.h.
#pragma once

#include <string>

#include <ATen/core/Tensor.h>

#include "ops/quant/official_storage.h"

namespace hadal::checkpoint {

/// ops::official_codes of values that come from a person: w [out, in] of any float type on any
/// device; the result lies on the CPU. A value that is not finite is an InputError that names the
/// tensor.
ops::StoredCodes quantise_fp8(const at::Tensor& w, const std::string& name);
/// in must be divisible by 32.
ops::StoredCodes quantise_fp4(const at::Tensor& w, const std::string& name);

}  // namespace hadal::checkpoint
