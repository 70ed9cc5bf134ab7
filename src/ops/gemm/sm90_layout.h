// How the Hopper kernels read the operands of a product. Host and device, free of ATen and CUDA.
//
// K-major operand (activations; FP8 and BF16 weights): K in slabs of 128 bytes (128 E4M3 or 64 BF16
// elements), rows in groups of 8; a group of a slab is 1,024 bytes, and piece c (16 bytes) of row r
// of a group lies at c ^ r, so that the copy engine moves it as it is and wgmma reads it (its
// 128-byte swizzle). The array is [slabs][row groups][8][128]. Rows and K are padded with zeros,
// which no sum sees.
//
// FP4 weights (A from registers): tiles of 64 rows and 128 inputs of kFp4TileBytes, [slabs][tiles]:
//   [2][128 threads][16 bytes]  two k steps of 32 to a half; words {row g, row g + 8} of a step,
//                               where g = 16 * (thread / 32) + (thread % 32) / 4, q = thread % 4
//   [64 rows][4 bytes]          base, unused, then four exponents of 4 bits, the first step's
//                               lowest
// A word holds the step's inputs 4 q .. 4 q + 3 (nibbles 0 to 3) and 16 + 4 q .. (nibbles 4 to 7):
// low three bits of a nibble = magnitude code; the signs of the first four are bits 7, 15, 23, 31,
// those of the others bits 3, 11, 19, 27. The fold (docs/decisions/0010-product-trees.md): the base
// of a row and slab is the largest of its four E8M0 scales; exponent i of a group means that its
// values are multiplied by 2^(i - 8), and the slab's sum by 2^(base - 127 - 6).
//
// E4M3 weights that are widened to BF16 (A from registers): tiles of 64 rows and 128 inputs of
// kWideTileBytes, [slabs][tiles]; a tile is [4][128 threads][16 bytes], two k steps of 16 to an
// entry, words {row g, row g + 8} of a step. A word holds the step's inputs 2 q, 2 q + 1, 8 + 2 q,
// 9 + 2 q, the first lowest.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HADAL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HADAL_HOST_DEVICE inline
#endif

namespace hadal::ops::sm90 {

/// Bytes of K in a slab of an operand.
inline constexpr int64_t kSlabBytes = 128;
/// Inputs of one chain from zero: E4M3 products; BF16 products.
inline constexpr int64_t kFp8Chain = 128;
inline constexpr int64_t kBf16Chain = 1024;
/// Rows of a group of a K-major operand and of a tile of FP4 weights.
inline constexpr int64_t kGroupRows = 8, kTileRows = 64;
inline constexpr int64_t kFp4TileBytes = 4096 + 256, kWideTileBytes = 8192;
/// 2^14: how far the scales of a row's 128 inputs may lie apart for the fold to be exact.
inline constexpr int kMaxSpread = 14;
/// Exponent that leaves a group's values as they are.
inline constexpr int kFp4Unity = 8;

HADAL_HOST_DEVICE int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

/// Byte offset of byte `k` of row `row` in a K-major operand of `groups` row groups.
HADAL_HOST_DEVICE int64_t operand_offset(int64_t row, int64_t k, int64_t groups) {
  const int64_t slab = k / kSlabBytes, piece = k % kSlabBytes / 16, r = row % kGroupRows;
  return ((slab * groups + row / kGroupRows) * kGroupRows + r) * kSlabBytes + ((piece ^ r) * 16) +
         k % 16;
}

/// Packs four codes of E2M1 (bits 0 to 3 each) and four more to a word of the FP4 tile.
HADAL_HOST_DEVICE uint32_t fp4_word(const uint8_t* first, const uint8_t* second) {
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    word |= static_cast<uint32_t>(first[i] & 7) << (4 * i);
    word |= static_cast<uint32_t>(second[i] & 7) << (16 + 4 * i);
    word |= static_cast<uint32_t>(first[i] >> 3 & 1) << (8 * i + 7);
    word |= static_cast<uint32_t>(second[i] >> 3 & 1) << (8 * i + 3);
  }
  return word;
}

}  // namespace hadal::ops::sm90
