// Weights in the form that the CPU's matrix kernel reads: FP32, BF16, or packed FP8 and FP4.
//
// Panels hold their values exactly and can stand alone: unpack_panels gives the dense weights back.
#pragma once

#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/gemm/linear_cpu.h"
#include "ops/quant/official_storage.h"

namespace hadal::ops {

/// One matrix [out, in], or several of one shape, in the layout of linear_cpu.h.
struct Panels {
  WeightFormat format = WeightFormat::kBf16;
  int64_t matrices = 0, out = 0, in = 0;
  at::Tensor data;  ///< [matrices, bytes] kByte
  /// [matrices, bytes] kByte, E8M0, or of FP8 alone [matrices, blocks * ceil(in / 128)] kFloat;
  /// undefined for FP32 and BF16.
  at::Tensor scales;

  int64_t padded_in() const;
  int64_t blocks() const;
  int64_t num_bytes() const;
  /// FP8 whose scales are FP32 of any value.
  bool has_factors() const { return scales.defined() && scales.scalar_type() == at::kFloat; }
};

/// Packs w [out, in] or [matrices, out, in], FP32 or BF16, on the CPU.
Panels pack_panels(const at::Tensor& w);

/// Packs matrices as official checkpoints store them (model.md 14.1, 14.4), all of one shape:
///   FP8  data [out, in] kFloat8_e4m3fn, scale [ceil(out / 128), ceil(in / 128)] E8M0 bytes, or
///        FP32 of any value (Base checkpoints), all matrices alike
///   FP4  data [out, in / 2] bytes, the even element low, scale [out, in / 32] E8M0 bytes
/// nullopt when the kernel has no packed form for the values: a scale whose magnitude is outside
/// 2^-60 to 2^60 (zero is inside where it is FP32), or NaN.
std::optional<Panels> pack_fp8(const std::vector<at::Tensor>& data,
                               const std::vector<at::Tensor>& scale);
std::optional<Panels> pack_fp4(const std::vector<at::Tensor>& data,
                               const std::vector<at::Tensor>& scale);

/// The values, [matrices, out, in]: FP32 for FP32 panels, FP32 too, rounded once, where scales are
/// no powers of two, else BF16.
at::Tensor unpack_panels(const Panels& panels);
/// The codes of one matrix of FP8 or FP4 panels, as an official checkpoint stores them. Scales of
/// zeros are those that the panels hold; FP32 ones come back as FP32.
StoredCodes panel_codes(const Panels& panels, int64_t matrix);

}  // namespace hadal::ops
