// The CPU's matrix kernel: a block of up to 64 outputs times some rows, weights decoded on the way.
//
// Weights lie in panels of 16 outputs, up to four panels to a block. A block is one stream of
// groups of 8 inputs; a group holds its panels one after the other, and a panel of a group is
//   FP32  [8][16] floats
//   BF16  [4 pairs][16][2]
//   FP8   [2][16] dwords of two pairs: even, even, odd, odd element (E4M3 bytes)
//   FP4   [16] dwords of four pairs: four nibbles of even elements, then four of odd ones (E2M1)
// Outputs beyond `out` and inputs beyond `in` are zeros, which change no sum.
//
// One tree for every shape of the task (numerics contract, rule 2): per output and slab one FP32
// accumulator that starts at zero and takes K in ascending pairs, the odd element of a pair first
// (as vdpbf16ps adds; FP32 weights take single elements in order); slabs are added in ascending
// order to the output. Subnormals are flushed to zero, as that instruction does; so kernels may use
// it, or fused multiply-adds of the values as floats, whichever the processor does faster.
//
// Where sums are exact in any order, a matrix unit that adds in another one gives the same bits and
// is used instead (AMX, FP4 weights; RowPacking::exact).
//
// FP8 values are multiplied by their scale as they are decoded. Where scales are no powers of two
// (`factors`), codes are decoded as they are and the slab's sum is multiplied as it is added, by
// one fused multiply-add; powers of two give the same bits either way. FP4 multiplies the slab's
// sum as it is added, which gives the bits of scaled weights: scales are powers of two between
// 2^-60 and 2^60, and activations that went through Q8_128 are multiples of 2^-31, so nothing is
// flushed or overflows on one way only. (For other activations this holds while no sum is below
// 2^-66.)
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

enum class WeightFormat : int32_t { kF32, kBf16, kFp8, kFp4 };

inline constexpr int64_t kPanelWidth = 16;
inline constexpr int64_t kBlockPanels = 4;
inline constexpr int64_t kBlockWidth = kPanelWidth * kBlockPanels;
inline constexpr int64_t kGroupInputs = 8;
/// Rows of one task at most.
inline constexpr int64_t kTaskRows = 96;
/// Tasks of up to this many rows decode in registers (FP4 on matrix units: of fewer); those with
/// more decode each slab once and want x packed.
inline constexpr int64_t kFewRows = 4;
/// E8M0 bytes that the kernel takes.
inline constexpr int kMinScaleByte = 127 - 60, kMaxScaleByte = 127 + 60;
constexpr bool in_range(uint8_t scale) { return scale >= kMinScaleByte && scale <= kMaxScaleByte; }

/// Bytes of one panel of one group.
constexpr int64_t group_bytes(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF32:
      return 512;
    case WeightFormat::kBf16:
      return 256;
    case WeightFormat::kFp8:
      return 128;
    default:
      return 64;
  }
}

struct GemmTask {
  const uint8_t* weights;  ///< the block, see above
  const uint8_t* scales;   ///< of the block. FP8: [ceil(in / 128)]; FP4: [in / 32][panels][16]
  int64_t panels;          ///< of the block, 1 to 4
  int64_t outputs;         ///< of the block that exist, at most 16 a panel
  int64_t in;              ///< a multiple of kGroupInputs
  int64_t slab;            ///< 32 or 128; FP4 takes 32 alone
  const void* x;           ///< row r of slab s begins at element r * x_row + s * x_slab
  int64_t x_row, x_slab;
  int64_t rows;  ///< 1 to kTaskRows
  void* y;       ///< [rows, outputs]
  int64_t y_row;
  WeightFormat format;
  ElementType x_type;              ///< FP32, or BF16 where gemm_row_form_cpu says so
  ElementType result;              ///< of y: one rounding
  const uint16_t* exact;           ///< RowPacking::exact, or null
  const float* factors = nullptr;  ///< of FP8 in place of scales: [ceil(in / 128)]
};

extern CpuSlot<void(const GemmTask&)> gemm_cpu;

/// How the kernel wants the rows of a task whose weights are not FP32.
struct RowForm {
  bool bf16 = false;   ///< BF16 rows: where BF16 products are fast
  bool exact = false;  ///< packed, with RowPacking::exact: where matrix units are there to use
};
extern CpuSlot<void(int64_t rows, WeightFormat format, RowForm*)> gemm_row_form_cpu;

/// Rows of one matrix unit's tile.
inline constexpr int64_t kUnitRows = 16;

/// Rows laid out [slab][row][slab inputs], so that the rows of one slab lie together; behind `in`
/// zeros as far as a group reaches.
struct RowPacking {
  const void* x;
  int64_t x_row, rows, in, slab;
  int64_t begin, end;    ///< the inputs to pack in this call: slabs, or up to `in`
  void* packed;          ///< of all slabs
  ElementType from, to;  ///< BF16 may become FP32
  /// [slabs][ceil(rows / 16)], or null: a bit for each of 16 rows, set where no sum of products of
  /// the row's slab with FP4 codes is ever rounded, whatever its order. All products are multiples
  /// of half the rows' last set bit u, and no partial sum exceeds 6 sum |x|; so it is where 12 sum
  /// |x| <= 2^24 u. Activations that went through Q8_128 are almost always like that.
  uint16_t* exact;
};
extern CpuSlot<void(const RowPacking&)> pack_rows_cpu;

}  // namespace hadal::ops
