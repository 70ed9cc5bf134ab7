// E2M1 values to E4M3 in registers: a look-up among the eight magnitudes, with an exponent folded
// in.
#pragma once

#include <cstdint>

#include <cuda_runtime.h>

namespace hadal::ops::cuda {

/// E4M3 codes of the E2M1 magnitudes 0, 0.5, 1, 1.5 (low word) and 2, 3, 4, 6 (high word), lowest
/// byte first, times 2^(exponent - sm90::kFp4Unity); exponent 0 to 14.
__device__ __forceinline__ uint2 fp4_codes(int exponent) {
  constexpr int kHalves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  uint32_t words[2] = {0, 0};
  for (int i = 0; i < 8; ++i) {
    const int units = kHalves[i] << exponent;  // multiples of 2^-9
    const int top = 31 - __clz(units);
    const int code = units < 8 ? units : (top - 2) << 3 | ((units >> (top - 3)) & 7);
    words[i / 4] |= static_cast<uint32_t>(code) << (i % 4 * 8);
  }
  return make_uint2(words[0], words[1]);
}

/// Bytes of (x, y) by the low three bits of the selector's four lowest nibbles, whose fourth bits
/// are zero. As assembly, since the intrinsic would mask the selector once more.
__device__ __forceinline__ uint32_t select_bytes(uint32_t x, uint32_t y, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(selector));
  return result;
}

/// Eight codes of a word of an FP4 weight tile (sm90_layout.h): first[0..3] and second[0..3], a
/// byte each.
__device__ __forceinline__ void decode_fp4_tile(uint32_t word,
                                                uint2 codes,
                                                uint32_t& first,
                                                uint32_t& second) {
  const uint32_t magnitudes = word & 0x77777777u;
  first = select_bytes(codes.x, codes.y, magnitudes) | (word & 0x80808080u);
  second = select_bytes(codes.x, codes.y, magnitudes >> 16) | (word << 4 & 0x80808080u);
}

/// Eight codes of four bytes of a cache row (even element in the low nibble), in their order.
__device__ __forceinline__ void decode_fp4_row(uint32_t word,
                                               uint2 codes,
                                               uint32_t& first,
                                               uint32_t& second) {
  const uint32_t magnitudes = word & 0x77777777u, signs = word >> 3 & 0x11111111u;
  first = select_bytes(codes.x, codes.y, magnitudes) | select_bytes(0x8000u, 0, signs);
  second = select_bytes(codes.x, codes.y, magnitudes >> 16) | select_bytes(0x8000u, 0, signs >> 16);
}

}  // namespace hadal::ops::cuda
