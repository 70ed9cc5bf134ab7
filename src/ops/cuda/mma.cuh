// Tensor-core tiles of BF16 in shared memory: 64 rows of 128 channels, swizzled by 16-byte pieces
// so that ldmatrix is free of bank conflicts; m16n8k16 products with FP32 accumulators. Device code
// only.
//
// Fragment layout of one warp (lane = 4 * group + pair): an accumulator tile of 16 x 8 holds rows
// group and group + 8, columns 2 * pair and 2 * pair + 1; entries 0, 1 belong to the upper row, 2,
// 3 to the lower.
#pragma once

#include <cstdint>

#include <cuda_bf16.h>

namespace hadal::ops::cuda {

inline constexpr int kTileRows = 64;
inline constexpr int kTileDim = 128;
inline constexpr int kTileBytes = kTileRows * kTileDim * 2;

/// Byte offset of the 16-byte piece `piece` (8 channels) of a row.
__device__ __forceinline__ uint32_t tile_offset(int row, int piece) {
  return static_cast<uint32_t>(row * (kTileDim * 2) + ((piece ^ (row & 7)) << 4));
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

/// Copies 16 bytes asynchronously; zeros when !valid (src is then not read).
__device__ __forceinline__ void copy_async(uint32_t dst, const void* src, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(dst), "l"(src), "r"(bytes));
}
__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;\n" ::); }
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending));
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

__device__ __forceinline__ void mma_bf16(float (&d)[4],
                                         const uint32_t (&a)[4],
                                         uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Two floats as a BF16 pair, the first in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

/// A fragments of 16 rows (first_row ..) over all 128 channels.
__device__ __forceinline__ void load_a(uint32_t (&a)[8][4],
                                       uint32_t tile,
                                       int first_row,
                                       int lane) {
  const int row = first_row + (lane & 15), half = lane >> 4;
#pragma unroll
  for (int step = 0; step < 8; ++step)
    ldmatrix_x4(a[step], tile + tile_offset(row, step * 2 + half));
}

/// acc[n] += A (16 x 128) B^T for the kGroups * 16 tile rows from first_row on: the B rows are
/// keys.
template <int kGroups>
__device__ __forceinline__ void product_rows(float (&acc)[kGroups * 2][4],
                                             const uint32_t (&a)[8][4],
                                             uint32_t tile,
                                             int first_row,
                                             int lane) {
  // ldmatrix gives B for 16 rows x 16 channels: matrices (rows 0-7, ch 0-7), (rows 0-7, ch 8-15),
  // (rows 8-15, ...).
  const int row = (lane & 7) + ((lane >> 4) << 3), half = (lane >> 3) & 1;
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      uint32_t b[4];
      ldmatrix_x4(b, tile + tile_offset(first_row + group * 16 + row, step * 2 + half));
      mma_bf16(acc[group * 2], a[step], b[0], b[1]);
      mma_bf16(acc[group * 2 + 1], a[step], b[2], b[3]);
    }
  }
}

/// acc (16 x 128) += A (16 x kSteps * 16) B, B rows first_row .. of the tile (k runs along tile
/// rows).
template <int kSteps>
__device__ __forceinline__ void product_columns(
    float (&acc)[16][4], const uint32_t (&a)[kSteps][4], uint32_t tile, int first_row, int lane) {
  const int row = (lane & 7) + (((lane >> 3) & 1) << 3), half = lane >> 4;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, tile + tile_offset(first_row + step * 16 + row, pair * 2 + half));
      mma_bf16(acc[pair * 2], a[step], b[0], b[1]);
      mma_bf16(acc[pair * 2 + 1], a[step], b[2], b[3]);
    }
  }
}

/// Accumulator tiles [kSteps * 2][4] of weights as A fragments of kSteps k-steps, rounded to BF16.
template <int kSteps>
__device__ __forceinline__ void to_a(uint32_t (&a)[kSteps][4], const float (&acc)[kSteps * 2][4]) {
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    a[step][0] = pack_bf16(acc[step * 2][0], acc[step * 2][1]);
    a[step][1] = pack_bf16(acc[step * 2][2], acc[step * 2][3]);
    a[step][2] = pack_bf16(acc[step * 2 + 1][0], acc[step * 2 + 1][1]);
    a[step][3] = pack_bf16(acc[step * 2 + 1][2], acc[step * 2 + 1][3]);
  }
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

}  // namespace hadal::ops::cuda
