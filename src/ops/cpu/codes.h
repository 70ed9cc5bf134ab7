// E4M3 and E2M1 codes to floats, and floats to E4M3 values, for kernels of one instruction set;
// like vec.h everything lives in a namespace named after the set.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops::cpu::HADAL_ISA {

HADAL_INLINE float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
HADAL_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

/// Nearest multiple of 2^step, ties to even, by adding and subtracting 1.5 * 2^(23 + step).
HADAL_INLINE F16 round_to_step(F16 x, F16 magic) { return (x + magic) - magic; }

/// Nearest E4M3 value, ties to even, of |x| <= 448: four significant bits, steps of 2^-9 below
/// 2^-6. NaN stays.
HADAL_INLINE F16 round_e4m3(F16 x) {
  // The step is 2^(exponent of x - 3), so 1.5 * 2^(exponent + 20) rounds to it.
  float v[16], m[16];
  to_array(v, x);
  for (int i = 0; i < 16; ++i) {
    uint32_t exponent = float_bits(v[i]) >> 23 & 0xffu;
    if (exponent < 121u) exponent = 121u;  // 2^-6: below it steps no longer shrink
    if (exponent > 136u) exponent = 136u;  // of NaN
    m[i] = bits_float(((exponent + 20u) << 23) | 0x400000u);
  }
  return round_to_step(x, load(m));
}

#if defined(HADAL_ISA_avx512)
/// 16 E4M3 codes, one a dword; subnormal codes (below 8) are their mantissa times 2^-9.
HADAL_INLINE __m512 e4m3(__m512i code) {
  const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
  const __m512 normal = _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23)));
  const __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
  const __m512 value =
      _mm512_mask_mul_ps(normal, small, _mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign));
}
/// 16 E2M1 codes, one a dword.
HADAL_INLINE __m512 e2m1(__m512i code) {
  const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f,
                                      -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  return _mm512_permutexvar_ps(code, table);
}
#elif defined(HADAL_ISA_avx2)
/// The E4M3 byte at bit `shift`; subnormal codes (below 8) are their mantissa times 2^-9.
HADAL_INLINE __m256 e4m3(__m256i v, int shift) {
  const __m256i code = _mm256_srli_epi32(v, shift);
  const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
  const __m256 normal = _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
  return _mm256_or_ps(_mm256_blendv_ps(normal, small, _mm256_castsi256_ps(is_small)),
                      _mm256_castsi256_ps(sign));
}
/// The E2M1 nibble at bit `shift`.
HADAL_INLINE __m256 e2m1(__m256i v, int shift) {
  const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(v, 28 - shift),
                                        _mm256_set1_epi32(static_cast<int>(0x80000000u)));
  // The look-up takes the low three bits of its index alone.
  return _mm256_or_ps(_mm256_permutevar8x32_ps(magnitudes, _mm256_srli_epi32(v, shift)),
                      _mm256_castsi256_ps(sign));
}
#else
HADAL_INLINE float e4m3(uint32_t v, int shift) {
  const uint32_t magnitude = v >> shift & 0x7fu;
  const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                    : bits_float((magnitude << 20) + (120u << 23));
  return (v >> shift & 0x80u) != 0 ? -value : value;
}
HADAL_INLINE float e2m1(uint32_t v, int shift) {
  const uint32_t m = v >> shift & 7u;
  const float value = m < 2 ? 0.5f * static_cast<float>(m) : bits_float((m << 22) + (126u << 23));
  return (v >> shift & 8u) != 0 ? -value : value;
}
#endif

}  // namespace hadal::ops::cpu::HADAL_ISA
