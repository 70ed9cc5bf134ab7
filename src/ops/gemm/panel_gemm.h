// Matrix products of the CPU: y[r, n] = sum_k x[r, k] * w[n, k], one reduction tree for every row
// count.
//
// Weights are repacked at load into blocks of up to 4 panels of 16 outputs. The tree (numerics
// contract, rule 2): K is padded with zeros to a multiple of the slab; inside a slab one FP32
// accumulator per output starts at +0 and takes the pairs (2p, 2p+1) in ascending order by two
// fused multiply-adds, the odd element first, as vdpbf16ps does; then y = fma(slab, scale, y),
// slabs ascending, y starting at +0 (scale 1 for formats without scales). Denormals are flushed
// everywhere. The slab follows the role of a layer and not its storage: 32 for routed experts of an
// FP4 model, else 128. So values stored as BF16, FP8 or FP4 give the same bits. Rows, threads and
// instruction sets never change a bit.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/cpu.h"

namespace hadal::gemm {

enum class WeightFormat { kF32, kBf16, kFp8, kFp4 };
enum class ScaleType { kNone, kE8m0, kF32 };
enum class RowType { kF32, kBf16 };

/// A weight matrix [n, k]. FP8 has scales [ceil(n/128), ceil(k/128)], FP4 has E8M0 scales [n,
/// ceil(k/32)].
struct WeightDesc {
  WeightFormat format = WeightFormat::kBf16;
  int64_t n = 0, k = 0;
  int slab = 128;  ///< 32 or 128; FP4 needs 32
  ScaleType scale = ScaleType::kNone;
};

/// Bytes of the packed form. Throws Error for a description that makes no sense.
size_t packed_bytes(const WeightDesc& desc);
/// Packs a row-major [n, k] matrix (FP4: two codes a byte, the even one low) and its scales into
/// `dst`, which holds packed_bytes(desc) and should be aligned to 64 bytes.
void pack(const WeightDesc& desc, const void* weight, const void* scale, void* dst);

/// Some rows of a product. `x` is [rows, k] and `y` [rows, n] with strides in elements. BF16 rows
/// multiply any format; F32 rows too, with plain FP32 fused multiply-adds in the same order. BF16
/// outputs are rounded once.
struct GemmParams {
  WeightDesc desc;
  const void* packed = nullptr;
  const void* x = nullptr;
  RowType x_type = RowType::kBf16;
  int64_t x_stride = 0;
  void* y = nullptr;
  RowType y_type = RowType::kF32;
  int64_t y_stride = 0;
  int64_t rows = 0;
};
void gemm(const GemmParams& params);
/// `count` products in one parallel region; entries with rows == 0 are skipped.
void grouped_gemm(const GemmParams* params, int64_t count);

/// The FP8 round trip of activations, model.md 4.2: groups of `group` channels, floor 1e-4,
/// power-of-two scales; the result is exact in BF16. x: [rows, k], stride k; k a multiple of group.
void quantize_rows_fp8(
    const void* x, RowType x_type, uint16_t* y, int64_t rows, int64_t k, int64_t group);

// What the kernels of one instruction set get; filled by panel_gemm.cpp.
namespace detail {

struct Tile {
  const GemmParams* params;
  const void* x;  ///< rows of this tile, k padded to the slab; BF16, or F32 (see wants_f32)
  int64_t x_stride;
  int64_t block, row0, rows;
  float* scratch;  ///< kScratchFloats(rows)
};
inline constexpr int64_t kMaxTileRows = 252;
inline constexpr int64_t kBlockPanels = 4;
inline constexpr int64_t kScratchFloats = 64 * 128 + 64 * 8 + kMaxTileRows * 64;

/// Where block b begins and how its slabs are laid out: `panels` tiles of values, then their
/// scales.
struct BlockLayout {
  int64_t panels, value_bytes, scale_bytes, slabs, offset;
  int64_t slab_bytes() const { return panels * (value_bytes + scale_bytes); }
};
BlockLayout block_layout(const WeightDesc& desc, int64_t block);

extern CpuSlot<void(const Tile&)> tile_slot;
extern CpuSlot<void(bool*)> native_bf16_slot;
}  // namespace detail

}  // namespace hadal::gemm
