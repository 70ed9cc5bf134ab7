// Matrices as checkpoints store them to the layouts of the products: every thread writes 16 bytes.
#include "ops/cuda/launch.cuh"
#include "ops/gemm/pack_sm90.h"
#include "ops/gemm/sm90_pack_items.h"

namespace hadal::ops::cuda {
namespace {

using sm90::kFp4TileBytes;
using sm90::kTileRows;

constexpr int kThreads = 256;

/// A block a tile: its 64 rows of 64 bytes go through shared memory, because the words that a
/// thread makes come from two rows, two bytes at a time.
__global__ void __launch_bounds__(kThreads) pack_fp4_kernel(const PackFp4Sm90Params p) {
  // Rows of 64 bytes, 16 apart from each other's banks.
  constexpr int kStride = 80;
  __shared__ __align__(16) uint8_t codes[kTileRows * kStride];
  const int64_t slabs = (p.in + 127) / 128, tiles = (p.outputs + kTileRows - 1) / kTileRows;
  const int64_t tile = blockIdx.x % tiles, slab = blockIdx.x / tiles % slabs;
  const int64_t matrix = blockIdx.x / tiles / slabs;
  const int steps = static_cast<int>(min(int64_t{4}, p.in / 32 - slab * 4));
  const int rows = static_cast<int>(min(kTileRows, p.outputs - tile * kTileRows));
  const int64_t first = matrix * p.outputs + tile * kTileRows;
  const int t = static_cast<int>(threadIdx.x);
  if (t / 4 < rows && t % 4 < steps) {
    *reinterpret_cast<uint4*>(codes + t / 4 * kStride + t % 4 * 16) = __ldcs(
        reinterpret_cast<const uint4*>(p.codes + (first + t / 4) * (p.in / 2) + slab * 64) + t % 4);
  }
  __syncthreads();
  uint8_t* to = p.tiles + static_cast<int64_t>(blockIdx.x) * kFp4TileBytes;
  uint32_t words[4];
  sm90::fp4_entry(codes, kStride, rows, steps, t, words);
  reinterpret_cast<uint4*>(to)[t] = make_uint4(words[0], words[1], words[2], words[3]);
  if (t >= kTileRows) return;
  uint32_t word = 0;
  if (t < rows &&
      !sm90::fp4_scale_word(codes + t * kStride, p.scales + (first + t) * (p.in / 32) + slab * 4,
                            steps, &word))
    *p.inexact = 1;
  reinterpret_cast<uint32_t*>(to + 4096)[t] = word;
}

__global__ void __launch_bounds__(kThreads)
    pack_operand_kernel(const PackOperandSm90Params p, int64_t groups, int64_t pieces) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.matrices * pieces) return;
  const int64_t from = sm90::operand_source(i % pieces, groups, p.outputs, p.row_bytes);
  uint4 piece = make_uint4(0, 0, 0, 0);
  if (from >= 0)
    piece = *reinterpret_cast<const uint4*>(p.rows + i / pieces * p.outputs * p.row_bytes + from);
  reinterpret_cast<uint4*>(p.operand)[i] = piece;
}

__global__ void __launch_bounds__(kThreads) pack_widened_kernel(const PackWidenedSm90Params p) {
  const int64_t entries = p.outputs * p.in / 16;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= p.matrices * entries) return;
  __align__(16) uint8_t bytes[16];
  sm90::widened_entry(p.codes + i / entries * p.outputs * p.in, p.outputs, p.in, i % entries,
                      bytes);
  reinterpret_cast<uint4*>(p.tiles)[i] = *reinterpret_cast<const uint4*>(bytes);
}

/// A block a scale: whether its 128 x 128 codes are all zeros.
__global__ void __launch_bounds__(kThreads) pack_scales_kernel(const PackScalesSm90Params p) {
  const int64_t blocks = (p.outputs + 127) / 128, slabs = (p.in + 127) / 128;
  const int64_t i = blockIdx.x, slab = i % slabs, block = i / slabs % blocks;
  const int64_t matrix = i / slabs / blocks;
  const int t = static_cast<int>(threadIdx.x);
  const int64_t k = slab * 128 + t % 128;
  uint32_t magnitude = 0;
  for (int64_t row = block * 128 + t / 128; row < min(p.outputs, block * 128 + 128); row += 2)
    if (k < p.in) magnitude |= p.codes[(matrix * p.outputs + row) * p.in + k] & 0x7fu;
  const bool used = __syncthreads_or(magnitude != 0) != 0;
  if (t != 0) return;
  const uint8_t scale = p.scales[i];
  const bool fits = scale >= kMinScaleByte && scale <= p.most;
  if (used && !fits) *p.inexact = 1;
  p.out[(matrix * slabs + slab) * blocks + block] = used && fits ? sm90::scale_value(scale) : 1.0f;
}

}  // namespace
}  // namespace hadal::ops::cuda

namespace hadal::ops {

void pack_fp4_sm90(const PackFp4Sm90Params& p, Stream stream) {
  if (p.in % 32 != 0) throw_kernel_error("pack_fp4_sm90", "inputs are no multiple of 32");
  const int64_t tiles = (p.in + 127) / 128 * ((p.outputs + 63) / 64);
  cuda::pack_fp4_kernel<<<cuda::blocks_for(p.matrices * tiles, 1), cuda::kThreads, 0,
                          cuda::as_stream(stream)>>>(p);
  cuda::check_launch("pack_fp4_sm90");
}

void pack_operand_sm90(const PackOperandSm90Params& p, Stream stream) {
  if (p.row_bytes % 16 != 0) throw_kernel_error("pack_operand_sm90", "rows of other than 16 bytes");
  const int64_t groups = sm90::round_up(p.outputs, sm90::kTileRows) / sm90::kGroupRows;
  const int64_t pieces = (p.row_bytes + 127) / 128 * groups * 64;
  cuda::pack_operand_kernel<<<cuda::blocks_for(p.matrices * pieces, cuda::kThreads), cuda::kThreads,
                              0, cuda::as_stream(stream)>>>(p, groups, pieces);
  cuda::check_launch("pack_operand_sm90");
}

void pack_widened_sm90(const PackWidenedSm90Params& p, Stream stream) {
  if (p.outputs % sm90::kTileRows != 0 || p.in % 128 != 0)
    throw_kernel_error("pack_widened_sm90", "not in tiles of 64 x 128");
  cuda::
      pack_widened_kernel<<<cuda::blocks_for(p.matrices * (p.outputs * p.in / 16), cuda::kThreads),
                            cuda::kThreads, 0, cuda::as_stream(stream)>>>(p);
  cuda::check_launch("pack_widened_sm90");
}

void pack_scales_sm90(const PackScalesSm90Params& p, Stream stream) {
  const int64_t scales = p.matrices * ((p.outputs + 127) / 128) * ((p.in + 127) / 128);
  cuda::pack_scales_kernel<<<cuda::blocks_for(scales, 1), cuda::kThreads, 0,
                             cuda::as_stream(stream)>>>(p);
  cuda::check_launch("pack_scales_sm90");
}

}  // namespace hadal::ops
