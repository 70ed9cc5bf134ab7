// y = x w^T: the only matrix product on a token's path, dense and grouped by expert
// (model.md 14.4).
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/gemm/panels.h"
#include "ops/op.h"

namespace hadal::ops {

/// What a matrix is for decides its arithmetic in `released` and `fp8`, whatever its storage
/// (numerics contract, rule 4). `fp8` has no FP4: experts are kFp8 there (model::Parameter).
enum class GemmRole {
  kFp32,  ///< lin32: FP32 result (router, compressor, head); no activation round trip
  kBf16,  ///< linbf: no activation round trip
  kFp8,   ///< lin8: activations through Q8_128, scale slabs of 128 along K
  kFp4,   ///< lin4: activations through Q8_128, scale slabs of 32 along K (routed experts)
};

/// Whether these numerics quantise the activations of this role: `released` and `fp8` do.
bool quantises_input(GemmRole role, Numerics numerics);

/// Input channels between roundings of the accumulator into the output accumulator.
int64_t slab_length(GemmRole role);

/// The activation rounding of a role: Q8_128 where quantises_input says so, x itself otherwise.
/// Callers that feed one x to several matrices round once.
at::Tensor quantise_input(const at::Tensor& x, GemmRole role, Numerics numerics);

/// y[t, o] = sum_i x[t, i] w[o, i], FP32 accumulation (FP64 for FP64 input), one rounding.
///   x  [tokens, in]   already through quantise_input
///   w  [out, in]      dequantised values: FP64, FP32 or BF16
///   result FP32 for kFp32, else x's dtype
at::Tensor linear(const at::Tensor& x, const at::Tensor& w, GemmRole role);

/// Rows of x sorted by expert: y[i] = w[e] x[i] for offsets[e] <= i < offsets[e + 1].
///   x        [rows, in]
///   w        [experts, out, in]
///   offsets  [experts + 1] I64 on x's device, offsets[experts] = rows
at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role);

/// Output projection per group: y[t, g] = w[g] x[t, g].
///   x  [tokens, groups, in],  w  [groups, out, in],  result [tokens, groups, out]
at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w);

/// The same products of weights that were packed once; the same bits as of their dense values.
/// Packed weights are constants. Where the CPU kernel does not serve x (see serves_panels) the
/// dense values are made for the call.
at::Tensor linear(const at::Tensor& x, const Panels& w, GemmRole role);
at::Tensor grouped_linear(const at::Tensor& x,
                          const Panels& w,
                          const at::Tensor& offsets,
                          GemmRole role);
at::Tensor group_linear(const at::Tensor& x, const Panels& w);
/// FP32 or BF16 on the CPU, no gradient asked for, no ReferenceGuard.
bool serves_panels(const at::Tensor& x);
/// This thread keeps memory of its products for the next one; it gives that back.
void release_packed_rows();

namespace reference {
at::Tensor linear(const at::Tensor& x, const at::Tensor& w, GemmRole role);
at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role);
at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w);
}  // namespace reference

}  // namespace hadal::ops
