// Sixteen FP32 lanes, the same arithmetic on every instruction set.
//
// Included only by *_cpu.cpp files, which are compiled once per instruction set: everything lives
// in a namespace named after the set, so that no AVX-512 code can be merged into a function that an
// older processor runs. Operations are IEEE single operations in a written order; reductions use
// one tree (halves 8, 4, 2, 1). With fused multiply-add, every set gives the same bits.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(HADAL_ISA_avx512) || defined(HADAL_ISA_avx2)
#include <immintrin.h>
#endif

#define HADAL_INLINE __attribute__((always_inline)) inline

namespace hadal::ops::cpu::HADAL_ISA {

inline constexpr int64_t kLanes = 16;

HADAL_INLINE float bf16_to_float(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

/// Round to nearest even; NaN stays NaN.
HADAL_INLINE uint16_t float_to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

#if defined(HADAL_ISA_avx512)

struct F16 {
  __m512 v;
};
HADAL_INLINE F16 splat(float x) { return {_mm512_set1_ps(x)}; }
HADAL_INLINE F16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
HADAL_INLINE F16 load(const uint16_t* p) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))};
}
HADAL_INLINE void store(float* p, F16 x) { _mm512_storeu_ps(p, x.v); }
/// The BF16 value of every lane in its upper half; what the lower half holds does not count.
HADAL_INLINE __m512i round_to_bf16(F16 x) {
  // Written out rather than vcvtneps2bf16, which flushes subnormal inputs.
  const __m512i bits = _mm512_castps_si512(x.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
}
HADAL_INLINE void store(uint16_t* p, F16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_to_bf16(x), 16)));
}
/// The nearest BF16 value.
HADAL_INLINE F16 round_bf16(F16 x) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return {_mm512_castsi512_ps(_mm512_and_si512(round_to_bf16(x), high))};
}
HADAL_INLINE F16 operator+(F16 a, F16 b) { return {_mm512_add_ps(a.v, b.v)}; }
HADAL_INLINE F16 operator-(F16 a, F16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
HADAL_INLINE F16 operator*(F16 a, F16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
HADAL_INLINE F16 operator/(F16 a, F16 b) { return {_mm512_div_ps(a.v, b.v)}; }
HADAL_INLINE F16 fma(F16 a, F16 b, F16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
HADAL_INLINE F16 max(F16 a, F16 b) { return {_mm512_max_ps(a.v, b.v)}; }
HADAL_INLINE F16 min(F16 a, F16 b) { return {_mm512_min_ps(a.v, b.v)}; }
HADAL_INLINE F16 sqrt(F16 a) { return {_mm512_sqrt_ps(a.v)}; }
HADAL_INLINE F16 abs(F16 a) { return {_mm512_abs_ps(a.v)}; }
/// Nearest integer, ties to even.
HADAL_INLINE F16 round(F16 a) { return {_mm512_roundscale_ps(a.v, 8)}; }
/// a * 2^n for integral n in [-126, 127]; exact unless the result leaves the normal range.
HADAL_INLINE F16 scale_by_power(F16 a, F16 n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.v), _mm512_set1_epi32(127));
  return {_mm512_mul_ps(a.v, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)))};
}
/// x where a < b, else y.
HADAL_INLINE F16 if_less(F16 a, F16 b, F16 x, F16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
HADAL_INLINE void to_array(float (&out)[16], F16 x) { _mm512_storeu_ps(out, x.v); }
HADAL_INLINE __m256 low_half(F16 x) { return _mm512_castps512_ps256(x.v); }
HADAL_INLINE __m256 high_half(F16 x) { return _mm512_extractf32x8_ps(x.v, 1); }

#elif defined(HADAL_ISA_avx2)

struct F16 {
  __m256 lo, hi;
};
HADAL_INLINE F16 splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HADAL_INLINE F16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HADAL_INLINE __m256 widen(const uint16_t* p) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
HADAL_INLINE F16 load(const uint16_t* p) { return {widen(p), widen(p + 8)}; }
HADAL_INLINE void store(float* p, F16 x) {
  _mm256_storeu_ps(p, x.lo);
  _mm256_storeu_ps(p + 8, x.hi);
}
HADAL_INLINE __m256i round_to_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
  return _mm256_srli_epi32(_mm256_castps_si256(_mm256_blendv_ps(_mm256_castsi256_ps(rounded),
                                                                _mm256_castsi256_ps(quiet), nan)),
                           16);
}
HADAL_INLINE void store(uint16_t* p, F16 x) {
  const __m256i packed = _mm256_packus_epi32(round_to_bf16(x.lo), round_to_bf16(x.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
HADAL_INLINE F16 operator+(F16 a, F16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
HADAL_INLINE F16 operator-(F16 a, F16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
HADAL_INLINE F16 operator*(F16 a, F16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
HADAL_INLINE F16 operator/(F16 a, F16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
HADAL_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
HADAL_INLINE F16 max(F16 a, F16 b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
HADAL_INLINE F16 min(F16 a, F16 b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
HADAL_INLINE F16 sqrt(F16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
HADAL_INLINE F16 abs(F16 a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
HADAL_INLINE F16 round(F16 a) { return {_mm256_round_ps(a.lo, 8), _mm256_round_ps(a.hi, 8)}; }
HADAL_INLINE __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
HADAL_INLINE F16 scale_by_power(F16 a, F16 n) {
  return {_mm256_mul_ps(a.lo, power_of_two(n.lo)), _mm256_mul_ps(a.hi, power_of_two(n.hi))};
}
HADAL_INLINE F16 if_less(F16 a, F16 b, F16 x, F16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
HADAL_INLINE void to_array(float (&out)[16], F16 x) { store(out, x); }
HADAL_INLINE __m256 low_half(F16 x) { return x.lo; }
HADAL_INLINE __m256 high_half(F16 x) { return x.hi; }
HADAL_INLINE F16 round_bf16(F16 x) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(round_to_bf16(x.lo), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(round_to_bf16(x.hi), 16))};
}

#else

struct F16 {
  float v[16];
};
template <typename Op>
HADAL_INLINE F16 each(Op op) {
  F16 r;
  for (int i = 0; i < 16; ++i) r.v[i] = op(i);
  return r;
}
HADAL_INLINE F16 splat(float x) {
  return each([&](int) { return x; });
}
HADAL_INLINE F16 load(const float* p) {
  return each([&](int i) { return p[i]; });
}
HADAL_INLINE F16 load(const uint16_t* p) {
  return each([&](int i) { return bf16_to_float(p[i]); });
}
HADAL_INLINE void store(float* p, F16 x) {
  for (int i = 0; i < 16; ++i) p[i] = x.v[i];
}
HADAL_INLINE void store(uint16_t* p, F16 x) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(x.v[i]);
}
HADAL_INLINE F16 operator+(F16 a, F16 b) {
  return each([&](int i) { return a.v[i] + b.v[i]; });
}
HADAL_INLINE F16 operator-(F16 a, F16 b) {
  return each([&](int i) { return a.v[i] - b.v[i]; });
}
HADAL_INLINE F16 operator*(F16 a, F16 b) {
  return each([&](int i) { return a.v[i] * b.v[i]; });
}
HADAL_INLINE F16 operator/(F16 a, F16 b) {
  return each([&](int i) { return a.v[i] / b.v[i]; });
}
HADAL_INLINE F16 fma(F16 a, F16 b, F16 c) {
  return each([&](int i) { return __builtin_fmaf(a.v[i], b.v[i], c.v[i]); });
}
HADAL_INLINE F16 max(F16 a, F16 b) {
  return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
HADAL_INLINE F16 min(F16 a, F16 b) {
  return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
HADAL_INLINE F16 sqrt(F16 a) {
  return each([&](int i) { return __builtin_sqrtf(a.v[i]); });
}
HADAL_INLINE F16 abs(F16 a) {
  return each([&](int i) { return __builtin_fabsf(a.v[i]); });
}
HADAL_INLINE F16 round(F16 a) {
  return each([&](int i) { return __builtin_rintf(a.v[i]); });
}
HADAL_INLINE F16 scale_by_power(F16 a, F16 n) {
  return each([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return a.v[i] * power;
  });
}
HADAL_INLINE F16 if_less(F16 a, F16 b, F16 x, F16 y) {
  return each([&](int i) { return a.v[i] < b.v[i] ? x.v[i] : y.v[i]; });
}
HADAL_INLINE void to_array(float (&out)[16], F16 x) { store(out, x); }
HADAL_INLINE F16 round_bf16(F16 x) {
  return each([&](int i) { return bf16_to_float(float_to_bf16(x.v[i])); });
}

#endif

/// The first `count` (1..16) entries, the rest zero.
template <typename T>
HADAL_INLINE F16 load_partial(const T* p, int64_t count) {
  T buffer[16] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}
template <typename T>
HADAL_INLINE void store_partial(T* p, F16 x, int64_t count) {
  T buffer[16];
  store(buffer, x);
  std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

/// The one tree of every horizontal sum: lanes i and i + 8, then 4, 2, 1.
#if defined(HADAL_ISA_avx512) || defined(HADAL_ISA_avx2)
HADAL_INLINE float sum(F16 x) {
  const __m256 eight = _mm256_add_ps(low_half(x), high_half(x));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
HADAL_INLINE float max_lane(F16 x) {
  const __m256 eight = _mm256_max_ps(low_half(x), high_half(x));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
#else
HADAL_INLINE float sum(F16 x) {
  float v[16];
  to_array(v, x);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
  }
  return v[0];
}
HADAL_INLINE float max_lane(F16 x) {
  float v[16];
  to_array(v, x);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  }
  return v[0];
}
#endif

/// exp(x) within two units in the last place; 0 below -87, exp(88) above 88.
HADAL_INLINE F16 exp(F16 x) {
  const F16 clamped = min(max(x, splat(-87.0f)), splat(88.0f));
  const F16 n = round(clamped * splat(1.44269504088896341f));
  // ln 2 in two parts, so that the remainder keeps its last bits; then the classic degree-5
  // polynomial of cephes.
  F16 r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  F16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  return if_less(x, splat(-87.0f), splat(0.0f), scale_by_power(p, n));
}

HADAL_INLINE F16 sigmoid(F16 x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }

/// sum over i of a[i] * b[i]: one 16-lane accumulator along ascending i, then the tree.
template <typename A, typename B>
HADAL_INLINE float dot(const A* a, const B* b, int64_t count) {
  F16 acc = splat(0.0f);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) acc = fma(load(a + i), load(b + i), acc);
  if (i < count) acc = fma(load_partial(a + i, count - i), load_partial(b + i, count - i), acc);
  return sum(acc);
}

/// Calls body(i, n) for runs of n = 16 and a last shorter one.
template <typename Body>
HADAL_INLINE void for_lanes(int64_t count, Body&& body) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) body(i, int64_t{16});
  if (i < count) body(i, count - i);
}
template <typename T>
HADAL_INLINE F16 load_n(const T* p, int64_t n) {
  return n == 16 ? load(p) : load_partial(p, n);
}
template <typename T>
HADAL_INLINE void store_n(T* p, F16 x, int64_t n) {
  if (n == 16) {
    store(p, x);
  } else {
    store_partial(p, x, n);
  }
}

#if defined(HADAL_ISA_avx512)
/// Sums that dots16 has in flight.
inline constexpr int kDotRows = 16;

/// sum() of 16 vectors: the tree is walked for all at once, a level halving the vectors.
HADAL_INLINE void store_sums(float* out, const F16 (&x)[16]) {
  const auto halves = [](F16 a, F16 b) {  // [a0 + a8 .. a7 + a15, b likewise]
    return _mm512_add_ps(_mm512_shuffle_f32x4(a.v, b.v, 0x44),
                         _mm512_shuffle_f32x4(a.v, b.v, 0xee));
  };
  const auto quarters = [&](int i) {  // four floats each of x[i], x[i + 4], x[i + 8], x[i + 12]
    const __m512 a = halves(x[i], x[i + 4]), b = halves(x[i + 8], x[i + 12]);
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  const auto pairs = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
  };
  const __m512 a = pairs(quarters(0), quarters(1)), b = pairs(quarters(2), quarters(3));
  _mm512_storeu_ps(out,
                   _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd)));
}
#else
inline constexpr int kDotRows = 4;

HADAL_INLINE void store_sums(float* out, const F16 (&x)[4]) {
  for (int i = 0; i < 4; ++i) out[i] = sum(x[i]);
}
#endif

/// out[r] = dot(a, rows + r * count, count) for 16 rows.
template <typename A>
HADAL_INLINE void dots16(const A* a, const float* rows, int64_t count, float* out) {
  for (int first = 0; first < 16; first += kDotRows) {
    F16 acc[kDotRows];
#pragma GCC unroll 16
    for (int r = 0; r < kDotRows; ++r) acc[r] = splat(0.0f);
    for_lanes(count, [&](int64_t i, int64_t n) {
      const F16 x = load_n(a + i, n);
#pragma GCC unroll 16
      for (int r = 0; r < kDotRows; ++r)
        acc[r] = fma(x, load_n(rows + (first + r) * count + i, n), acc[r]);
    });
    store_sums(out + first, acc);
  }
}

}  // namespace hadal::ops::cpu::HADAL_ISA
