// Cached rows in the released precision, widened to FP32 (ops/attention/kv_rows.h). Included by CPU
// kernels only.
#pragma once

#include "ops/attention/kv_rows.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops::cpu::HADAL_ISA {

HADAL_INLINE float power_of_two(uint8_t scale) {
  const uint32_t bits = static_cast<uint32_t>(scale) << 23;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

#if defined(HADAL_ISA_avx512)

/// 16 E4M3 codes; below 8 they are subnormal: the code times 2^-9.
HADAL_INLINE F16 load_e4m3(const uint8_t* codes) {
  const __m512i code =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  const __m512i magnitude = _mm512_and_si512(code, _mm512_set1_epi32(0x7f));
  const __m512 normal = _mm512_castsi512_ps(
      _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23)));
  const __mmask16 small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
  const __m512 value =
      _mm512_mask_mul_ps(normal, small, _mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(code, _mm512_set1_epi32(0x80)), 24);
  return {_mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(value), sign))};
}

/// 16 E2M1 codes out of 8 bytes, the low half first.
HADAL_INLINE F16 load_e2m1(const uint8_t* pairs) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs));
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15)),
                high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  const __m512i code = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(low, high));
  const __m512 table = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f,
                                      -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  return {_mm512_permutexvar_ps(code, table)};
}

#elif defined(HADAL_ISA_avx2)

HADAL_INLINE __m256 load_e4m3_half(const uint8_t* codes) {
  const __m256i code =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi32(0x7f));
  const __m256 normal = _mm256_castsi256_ps(
      _mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
  const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(0x1p-9f));
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(0x80)), 24);
  return _mm256_or_ps(_mm256_blendv_ps(normal, small, _mm256_castsi256_ps(is_small)),
                      _mm256_castsi256_ps(sign));
}
HADAL_INLINE F16 load_e4m3(const uint8_t* codes) {
  return {load_e4m3_half(codes), load_e4m3_half(codes + 8)};
}

HADAL_INLINE __m256 e2m1_half(__m128i codes) {
  const __m256i code = _mm256_cvtepu8_epi32(codes);
  const __m256 table = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(code, _mm256_set1_epi32(8)), 28);
  return _mm256_or_ps(_mm256_permutevar8x32_ps(table, code), _mm256_castsi256_ps(sign));
}
HADAL_INLINE F16 load_e2m1(const uint8_t* pairs) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs));
  const __m128i low = _mm_and_si128(bytes, _mm_set1_epi8(15)),
                high = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
  const __m128i codes = _mm_unpacklo_epi8(low, high);
  return {e2m1_half(codes), e2m1_half(_mm_srli_si128(codes, 8))};
}

#else

HADAL_INLINE F16 load_e4m3(const uint8_t* codes) {
  float values[16];
  for (int i = 0; i < 16; ++i) {
    const int magnitude = codes[i] & 0x7f;
    const float value = magnitude < 8
                            ? static_cast<float>(magnitude) * 0x1p-9f
                            : static_cast<float>(8 + (magnitude & 7)) *
                                  power_of_two(static_cast<uint8_t>((magnitude >> 3) + 117));
    values[i] = (codes[i] & 0x80) != 0 ? -value : value;
  }
  return load(values);
}

HADAL_INLINE F16 load_e2m1(const uint8_t* pairs) {
  constexpr float kTable[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = kTable[pairs[i / 2] >> (i % 2 * 4) & 15];
  return load(values);
}

#endif

/// A packed row as FP32 [format.width].
HADAL_INLINE void widen_packed(float* out, const uint8_t* row, const RowFormat& format) {
  if (format.kind == RowKind::kLatent) {
    const int64_t rounded = format.width - format.rotary;
    const uint8_t* scales = row + rounded + 2 * format.rotary;
    for (int64_t i = 0; i < rounded; i += 16)
      store(out + i, load_e4m3(row + i) * splat(power_of_two(scales[i / 64])));
    const auto* rotary = reinterpret_cast<const uint16_t*>(row + rounded);
    for_lanes(format.rotary,
              [&](int64_t i, int64_t n) { store_n(out + rounded + i, load_n(rotary + i, n), n); });
    return;
  }
  const uint8_t* scales = row + format.width / 2;
  for (int64_t i = 0; i < format.width; i += 16)
    store(out + i, load_e2m1(row + i / 2) * splat(power_of_two(scales[i / 32])));
}

}  // namespace hadal::ops::cpu::HADAL_ISA
