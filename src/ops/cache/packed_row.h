// Cached rows, widened to FP32 (ops/cache/kv_rows.h). Included by CPU
// kernels only.
#pragma once

#include "ops/cache/kv_rows.h"
#include "ops/cpu/codes.h"
#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops::cpu::HADAL_ISA {

#if defined(HADAL_ISA_portable)

HADAL_INLINE F16 load_e4m3(const uint8_t* codes) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = e4m3(codes[i], 0);
  return load(values);
}
HADAL_INLINE F16 load_e2m1(const uint8_t* pairs) {
  float values[16];
  for (int i = 0; i < 16; ++i) values[i] = e2m1(pairs[i / 2], i % 2 * 4);
  return load(values);
}

#else

/// The 16 nibbles of 8 bytes, the low half first, one a byte.
HADAL_INLINE __m128i nibbles(const uint8_t* pairs) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pairs));
  return _mm_unpacklo_epi8(_mm_and_si128(bytes, _mm_set1_epi8(15)),
                           _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15)));
}
HADAL_INLINE __m128i load_codes(const uint8_t* codes) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
}
#if defined(HADAL_ISA_avx512)
HADAL_INLINE F16 load_e4m3(const uint8_t* codes) {
  return {e4m3(_mm512_cvtepu8_epi32(load_codes(codes)))};
}
HADAL_INLINE F16 load_e2m1(const uint8_t* pairs) {
  return {e2m1(_mm512_cvtepu8_epi32(nibbles(pairs)))};
}
#else
HADAL_INLINE F16 load_e4m3(const uint8_t* codes) {
  const __m128i all = load_codes(codes);
  return {e4m3(_mm256_cvtepu8_epi32(all), 0),
          e4m3(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)), 0)};
}
HADAL_INLINE F16 load_e2m1(const uint8_t* pairs) {
  const __m128i all = nibbles(pairs);
  return {e2m1(_mm256_cvtepu8_epi32(all), 0),
          e2m1(_mm256_cvtepu8_epi32(_mm_srli_si128(all, 8)), 0)};
}
#endif

#endif

/// The factor of a UE8M0 scale of at least 1.
HADAL_INLINE F16 scale_factor(uint8_t scale) {
  return splat(bits_float(static_cast<uint32_t>(scale) << 23));
}

/// A dense row as FP32 [dim].
template <typename T>
HADAL_INLINE void widen(float* out, const T* row, int64_t dim) {
  for_lanes(dim, [&](int64_t i, int64_t n) { store_n(out + i, load_n(row + i, n), n); });
}

/// A packed row as FP32 [format.width].
HADAL_INLINE void widen_packed(float* out, const uint8_t* row, const RowFormat& format) {
  if (format.kind == RowKind::kLatent) {
    const int64_t rounded = format.width - format.rotary;
    const uint8_t* scales = row + rounded + 2 * format.rotary;
    for (int64_t i = 0; i < rounded; i += 16)
      store(out + i, load_e4m3(row + i) * scale_factor(scales[i / 64]));
    const auto* rotary = reinterpret_cast<const uint16_t*>(row + rounded);
    for_lanes(format.rotary,
              [&](int64_t i, int64_t n) { store_n(out + rounded + i, load_n(rotary + i, n), n); });
    return;
  }
  const uint8_t* scales = row + format.width / 2;
  for (int64_t i = 0; i < format.width; i += 16)
    store(out + i, load_e2m1(row + i / 2) * scale_factor(scales[i / 32]));
}

}  // namespace hadal::ops::cpu::HADAL_ISA
