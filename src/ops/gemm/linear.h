// y = x w^T: the only matrix product on a token's path, dense and grouped by expert (model.md 4.4).
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/op.h"

namespace hadal::ops {

/// What a matrix is for decides its arithmetic in `released`, whatever its storage (numerics
/// contract, rule 4).
enum class GemmRole {
  kFp32,  ///< lin32: FP32 result (router, compressor, head); no activation round trip
  kBf16,  ///< linbf: no activation round trip
  kFp8,   ///< lin8: activations through Q8_128, scale slabs of 128 along K
  kFp4,   ///< lin4: activations through Q8_128, scale slabs of 32 along K (routed experts)
};

/// Whether `released` quantises the activations of this role.
bool quantises_input(GemmRole role, Numerics numerics);

/// Input channels between roundings of the accumulator into the output accumulator.
int64_t slab_length(GemmRole role);

/// The activation rounding of a role: Q8_128 where `released` asks for it, x itself otherwise.
/// Callers that feed one x to several matrices round once.
at::Tensor quantise_input(const at::Tensor& x, GemmRole role, Numerics numerics);

/// A weight packed for the CPU kernel, of one matrix or of several of one shape.
struct Panels {
  at::Tensor data;  ///< [matrices, packed elements] BF16 or FP32; undefined: not packed
  int64_t out = 0, in = 0;
};
/// Packs w [out, in] or [matrices, out, in], BF16 or FP32, on the CPU.
Panels pack_panels(const at::Tensor& w);

/// y[t, o] = sum_i x[t, i] w[o, i], FP32 accumulation (FP64 for FP64 input), one rounding.
///   x  [tokens, in]   already through quantise_input
///   w  [out, in]      dequantised values: FP64, FP32 or BF16
///   panels  the same weights packed, so that the CPU kernel need not pack them again; may be null
///   result FP32 for kFp32, else x's dtype
at::Tensor linear(const at::Tensor& x,
                  const at::Tensor& w,
                  GemmRole role,
                  const Panels* panels = nullptr);

/// Rows of x sorted by expert: y[i] = w[e] x[i] for offsets[e] <= i < offsets[e + 1].
///   x        [rows, in]
///   w        [experts, out, in]
///   offsets  [experts + 1] I64 on x's device, offsets[experts] = rows
at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role,
                          const Panels* panels = nullptr);

/// Output projection per group: y[t, g] = w[g] x[t, g].
///   x  [tokens, groups, in],  w  [groups, out, in],  result [tokens, groups, out]
at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w, const Panels* panels = nullptr);

namespace reference {
at::Tensor linear(const at::Tensor& x, const at::Tensor& w, GemmRole role);
at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role);
at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w);
}  // namespace reference

}  // namespace hadal::ops
