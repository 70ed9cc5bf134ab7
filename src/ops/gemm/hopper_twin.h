// The matrix products of the Hopper kernels, bit for bit, on a CPU.
//
// wgmma adds a fixed number of products and the accumulator in one fused sum that is cut, not
// rounded (the model and how it was found: docs/decisions/0010-product-trees.md). One instruction
// is
//   E4M3  32 products, each sum cut to 13 bits behind its leading one
//   BF16  16 products, cut to 23 bits
// A product chains instructions in ascending K from zero, over 128 inputs (E4M3) or 1,024 (BF16),
// and adds the chains in FP32, ascending. Free of ATen: functions of pointers.
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace hadal::ops {

/// One matrix instruction's fused sum c + sum a[k] b[k]. NaN anywhere gives 0x7fffffff.
float wgmma_e4m3(const uint8_t* a, const uint8_t* b, float c);    // 32 codes each
float wgmma_bf16(const uint16_t* a, const uint16_t* b, float c);  // 16 values each

/// y[r, o] = sum over slabs s of 128 inputs: chain(x[r, s], w[o, s]) * (x_scale[r, s] * w_scale[o,
/// s]), added in ascending order by fused multiply-adds (the scales are powers of two).
struct TwinFp8Task {
  const uint8_t* w;      ///< [outputs, in] E4M3 codes, no NaN
  const float* w_scale;  ///< [outputs, ceil(in / 128)]
  const uint8_t* x;      ///< [rows, in] E4M3 codes, no NaN
  const float* x_scale;  ///< [rows, ceil(in / 128)]
  float* y;              ///< [rows, outputs] before its rounding
  int64_t outputs, rows, in;
};
extern CpuSlot<void(const TwinFp8Task&)> twin_fp8_cpu;

/// y[r, o] = sum over segments of 1,024 inputs of chain(x[r], w[o]), added in ascending order.
/// Finite values.
struct TwinBf16Task {
  const uint16_t* w;  ///< [outputs, in]
  const uint16_t* x;  ///< [rows, in]
  float* y;           ///< [rows, outputs]
  int64_t outputs, rows, in;
  /// [rows, outputs] that the chain goes on from, of at most 1,024 inputs; null: zero. May be y.
  const float* from = nullptr;
};
extern CpuSlot<void(const TwinBf16Task&)> twin_bf16_cpu;

/// FP4 weights of one row folded into E4M3 (sm90_layout.h): codes [in] and one exact power of two
/// per 128 inputs. Returns false, with nothing to rely on written, where the scales of some 128
/// inputs spread beyond 2^14.
///   packed  [in / 2] the even element low;  scales [in / 32] E8M0 bytes;  in: a multiple of 32
bool fold_fp4(
    const uint8_t* packed, const uint8_t* scales, int64_t in, uint8_t* codes, float* slab_scales);

}  // namespace hadal::ops
