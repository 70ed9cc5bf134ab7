// FP8, FP4 and BF16 matrices as the Hopper kernels read them (sm90_layout.h), as tensors of a
// device.
//
// They hold their values exactly and can stand alone: unpack_sm90 gives the dense weights back, in
// plain ATen on whichever device they lie. Packed on the host.
#pragma once

#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/gemm/panels.h"

namespace hadal::ops {

/// One matrix [out, in], or several of one shape.
struct Sm90Matrices {
  WeightFormat format = WeightFormat::kFp8;  ///< FP8, FP4 or BF16
  /// FP8 whose product takes BF16 rows and widens the weights (`wo_a`).
  bool widened = false;
  int64_t matrices = 0, out = 0, in = 0;
  /// [matrices, bytes] kByte. FP8, BF16: K-major operand of row_groups(); FP4: tiles, scales
  /// within; widened FP8: tiles.
  at::Tensor data;
  at::Tensor scales;  ///< FP8: [matrices, slabs, ceil(out / 128)] FP32; else undefined

  int64_t slabs() const;       ///< of 128 inputs; of BF16: of 64
  int64_t row_groups() const;  ///< of 8 outputs; whole tiles of 64
  int64_t num_bytes() const;
  /// Whether the products multiply E4M3 rows.
  bool rounds_rows() const { return format != WeightFormat::kBf16 && !widened; }
  Sm90Matrices to(at::Device device) const;
};

/// Packs matrices as official checkpoints store them; arguments as of pack_fp8 and pack_fp4
/// (panels.h). nullopt when the layout has no exact form for the values: NaN, a scale outside
/// 2^-60 to 2^60, and for FP4 a row whose scales within 128 inputs lie more than 2^14 apart.
std::optional<Sm90Matrices> pack_sm90_fp8(const std::vector<at::Tensor>& data,
                                          const std::vector<at::Tensor>& scale);
std::optional<Sm90Matrices> pack_sm90_fp4(const std::vector<at::Tensor>& data,
                                          const std::vector<at::Tensor>& scale);
/// FP8 to be widened: nullopt also where out is no multiple of 64, in none of 128, and for a scale
/// above 2^7.
std::optional<Sm90Matrices> pack_sm90_widened(const std::vector<at::Tensor>& data,
                                              const std::vector<at::Tensor>& scale);
/// BF16 values on the CPU, [out, in] or [matrices, out, in]; nullopt where in is no multiple of 8.
std::optional<Sm90Matrices> pack_sm90_bf16(const at::Tensor& values);
/// FP8 or FP4 panels in this layout, FP8 to be widened if asked for; nullopt as above.
std::optional<Sm90Matrices> pack_sm90(const Panels& panels, bool widened = false);

/// The values of one matrix: [out, in] BF16 on the device of the data.
at::Tensor unpack_sm90(const Sm90Matrices& w, int64_t matrix);

}  // namespace hadal::ops
