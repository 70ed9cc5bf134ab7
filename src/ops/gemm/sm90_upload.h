// Matrices in codes or BF16 from the host's memory to the layout of the Hopper kernels on a device,
// which packs them there (pack_sm90.h): the host only reads them, once.
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/gemm/sm90_matrices.h"
#include "ops/upload.h"

namespace hadal::ops {

/// Where the matrices will lie, without values; undefined data where upload_sm90 has no way to
/// bring them there (widths, or what is not contiguous on the host): sm90_matrices.h has.
///   data   as of pack_sm90_fp8 and pack_sm90_fp4, or [out, in] BF16
///   scale  one for each, none for BF16
Sm90Matrices plan_upload(WeightFormat format,
                         bool widened,
                         const std::vector<at::Tensor>& data,
                         const std::vector<at::Tensor>& scale);

/// Gives planned matrices their values: the bytes that pack_sm90_* would make. Queued on the
/// device's current stream; what it returns, [1] kInt on the device, is not 0 in the end when the
/// layout has no exact form for the values, but never for NaN, which is not looked for. The
/// device holds a part of the stored matrices beside the result meanwhile.
at::Tensor upload_sm90(Uploader& uploader,
                       Sm90Matrices& planned,
                       const std::vector<at::Tensor>& data,
                       const std::vector<at::Tensor>& scale);

/// The bytes of a contiguous tensor of the host, as they are.
at::Tensor upload(Uploader& uploader, const at::Tensor& host);

}  // namespace hadal::ops
