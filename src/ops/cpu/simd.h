// Sixteen floats, the same bits on every instruction set.
//
// F16 is one __m512, two __m256 or an array, chosen by the HADAL_ISA_* macro of a *_cpu.cpp file;
// nothing else may include this header. Everything is in an inline namespace per instruction set
// and forced inline, so no code built for a newer processor can be linked in place of an older
// build. Operations are single IEEE operations (fma is fused), horizontal ones fold 16 -> 8 -> 4 ->
// 2 -> 1 by halves, and exp is made of fma and bit operations only. FlushDenormals sets FTZ and DAZ
// for its scope because vdpbf16ps always flushes.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(HADAL_ISA_avx2) || defined(HADAL_ISA_avx512)
#include <immintrin.h>
// GCC 12 warns about the undefined pass-through operands inside its own AVX-512 headers.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#elif defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define HADAL_INLINE inline __attribute__((always_inline))

#if defined(HADAL_ISA_avx512)
#define HADAL_SIMD_NAMESPACE isa_avx512
#elif defined(HADAL_ISA_avx2)
#define HADAL_SIMD_NAMESPACE isa_avx2
#else
#define HADAL_SIMD_NAMESPACE isa_portable
#endif

namespace hadal::simd {
inline namespace HADAL_SIMD_NAMESPACE {

inline constexpr int kLanes = 16;

/// Flush-to-zero and denormals-are-zero while it lives.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  HADAL_INLINE FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); }
  HADAL_INLINE ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
  ~FlushDenormals() {}
#endif
 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

HADAL_INLINE uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
HADAL_INLINE float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
HADAL_INLINE float bf16_to_float(uint16_t x) { return bits_float(static_cast<uint32_t>(x) << 16); }
/// Round to nearest even; NaN stays a (quiet) NaN.
HADAL_INLINE uint16_t float_to_bf16(float x) {
  const uint32_t bits = float_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(HADAL_ISA_avx512)

struct F16 {
  __m512 v;
};
using Mask16 = __mmask16;

HADAL_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
/// The first `count` lanes; the others are +0.
HADAL_INLINE F16 load_partial(const float* p, int count) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), p)};
}
HADAL_INLINE void store(float* p, F16 a) { _mm512_storeu_ps(p, a.v); }
HADAL_INLINE void store_partial(float* p, F16 a, int count) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << count) - 1u), a.v);
}
HADAL_INLINE F16 broadcast(float x) { return {_mm512_set1_ps(x)}; }
HADAL_INLINE F16 add(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
HADAL_INLINE F16 sub(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
HADAL_INLINE F16 mul(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
HADAL_INLINE F16 div(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
HADAL_INLINE F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
/// a * b + c, rounded once.
HADAL_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
/// a > b ? a : b per lane (b when either is NaN), as maxps.
HADAL_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
HADAL_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
HADAL_INLINE Mask16 less(F16 a, F16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
HADAL_INLINE F16 select(Mask16 m, F16 yes, F16 no) {
  return {_mm512_mask_blend_ps(m, no.v, yes.v)};
}
/// Float bits plus `n` << 23 where n holds small integers: a * 2^n inside the normal range.
HADAL_INLINE F16 shift_exponent(F16 a, F16 n) {
  const __m512i e = _mm512_slli_epi32(_mm512_cvtps_epi32(n.v), 23);
  return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a.v), e))};
}
HADAL_INLINE F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
HADAL_INLINE F16 load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
HADAL_INLINE void store_bf16(uint16_t* p, F16 a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  const __m512i high = _mm512_srli_epi32(_mm512_mask_blend_epi32(nan, rounded, quiet), 16);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(high));
}

#elif defined(HADAL_ISA_avx2)

struct F16 {
  __m256 a, b;
};
struct Mask16 {
  __m256 a, b;
};

HADAL_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HADAL_INLINE F16 load_partial(const float* p, int count) {
  alignas(32) float lanes[16] = {};
  std::memcpy(lanes, p, static_cast<size_t>(count) * 4);
  return load(lanes);
}
HADAL_INLINE void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
HADAL_INLINE void store_partial(float* p, F16 x, int count) {
  alignas(32) float lanes[16];
  store(lanes, x);
  std::memcpy(p, lanes, static_cast<size_t>(count) * 4);
}
HADAL_INLINE F16 broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HADAL_INLINE F16 add(F16 x, F16 y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
HADAL_INLINE F16 sub(F16 x, F16 y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
HADAL_INLINE F16 mul(F16 x, F16 y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
HADAL_INLINE F16 div(F16 x, F16 y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
HADAL_INLINE F16 sqrt(F16 x) { return {_mm256_sqrt_ps(x.a), _mm256_sqrt_ps(x.b)}; }
HADAL_INLINE F16 fma(F16 x, F16 y, F16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
HADAL_INLINE F16 max(F16 x, F16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
HADAL_INLINE F16 min(F16 x, F16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
HADAL_INLINE Mask16 less(F16 x, F16 y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_LT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_LT_OQ)};
}
HADAL_INLINE F16 select(Mask16 m, F16 yes, F16 no) {
  return {_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
HADAL_INLINE __m256 shift_exponent8(__m256 x, __m256 n) {
  const __m256i e = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), e));
}
HADAL_INLINE F16 shift_exponent(F16 x, F16 n) {
  return {shift_exponent8(x.a, n.a), shift_exponent8(x.b, n.b)};
}
HADAL_INLINE F16 abs(F16 x) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(x.a, mask), _mm256_and_ps(x.b, mask)};
}
HADAL_INLINE __m256 load_bf16x8(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
HADAL_INLINE F16 load_bf16(const uint16_t* p) { return {load_bf16x8(p), load_bf16x8(p + 8)}; }
HADAL_INLINE void store_bf16(uint16_t* p, F16 x) {
  alignas(32) float lanes[16];
  store(lanes, x);
  for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(lanes[i]);
}

#else

struct F16 {
  float v[16];
};
struct Mask16 {
  bool v[16];
};

#define HADAL_LANES(expression)                       \
  F16 r;                                              \
  for (int i = 0; i < 16; ++i) r.v[i] = (expression); \
  return r
HADAL_INLINE F16 load(const float* p) { HADAL_LANES(p[i]); }
HADAL_INLINE F16 load_partial(const float* p, int count) { HADAL_LANES(i < count ? p[i] : 0.0f); }
HADAL_INLINE void store(float* p, F16 a) { std::memcpy(p, a.v, 64); }
HADAL_INLINE void store_partial(float* p, F16 a, int count) {
  std::memcpy(p, a.v, static_cast<size_t>(count) * 4);
}
HADAL_INLINE F16 broadcast(float x) { HADAL_LANES(x); }
HADAL_INLINE F16 add(F16 a, F16 b) { HADAL_LANES(a.v[i] + b.v[i]); }
HADAL_INLINE F16 sub(F16 a, F16 b) { HADAL_LANES(a.v[i] - b.v[i]); }
HADAL_INLINE F16 mul(F16 a, F16 b) { HADAL_LANES(a.v[i] * b.v[i]); }
HADAL_INLINE F16 div(F16 a, F16 b) { HADAL_LANES(a.v[i] / b.v[i]); }
HADAL_INLINE F16 sqrt(F16 a) { HADAL_LANES(__builtin_sqrtf(a.v[i])); }
HADAL_INLINE F16 fma(F16 a, F16 b, F16 c) { HADAL_LANES(__builtin_fmaf(a.v[i], b.v[i], c.v[i])); }
HADAL_INLINE F16 max(F16 a, F16 b) { HADAL_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
HADAL_INLINE F16 min(F16 a, F16 b) { HADAL_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
HADAL_INLINE Mask16 less(F16 a, F16 b) {
  Mask16 m;
  for (int i = 0; i < 16; ++i) m.v[i] = a.v[i] < b.v[i];
  return m;
}
HADAL_INLINE F16 select(Mask16 m, F16 yes, F16 no) { HADAL_LANES(m.v[i] ? yes.v[i] : no.v[i]); }
HADAL_INLINE F16 shift_exponent(F16 a, F16 n) {
  HADAL_LANES(
      bits_float(float_bits(a.v[i]) + (static_cast<uint32_t>(static_cast<int32_t>(n.v[i])) << 23)));
}
HADAL_INLINE F16 abs(F16 a) { HADAL_LANES(__builtin_fabsf(a.v[i])); }
HADAL_INLINE F16 load_bf16(const uint16_t* p) { HADAL_LANES(bf16_to_float(p[i])); }
HADAL_INLINE void store_bf16(uint16_t* p, F16 a) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(a.v[i]);
}
#undef HADAL_LANES

#endif

HADAL_INLINE F16 zero() { return broadcast(0.0f); }

/// Sum of the lanes, folded by halves.
HADAL_INLINE float sum(F16 a) {
  float v[16];
  store(v, a);
  for (int half = 8; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  return v[0];
}
/// Largest lane, folded by halves with max().
HADAL_INLINE float max_lane(F16 a) {
  float v[16];
  store(v, a);
  for (int half = 8; half >= 1; half /= 2)
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}
/// e^x within about one ulp; 0 below -87.3 (also for -inf), e^88.3 above 88.3. NaN is not kept.
HADAL_INLINE F16 exp(F16 x) {
  const F16 low = broadcast(-87.33f);
  const F16 clamped = min(max(x, low), broadcast(88.3f));
  const F16 magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const F16 n = sub(fma(clamped, broadcast(1.44269504088896341f), magic), magic);
  F16 r = fma(n, broadcast(-0.693359375f), clamped);
  r = fma(n, broadcast(2.12194440054690583e-4f), r);
  F16 p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), broadcast(1.0f));
  return select(less(x, low), zero(), shift_exponent(p, n));
}

}  // namespace HADAL_SIMD_NAMESPACE
}  // namespace hadal::simd
