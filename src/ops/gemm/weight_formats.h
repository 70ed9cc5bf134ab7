// The weights of linear_cpu.h as the kernel's loops meet them: how a format is decoded to pairs of
// inputs, and how a pair enters a sum.
//
// Included by linear_cpu.cpp alone, once per instruction set; like vec.h everything lives in a
// namespace named after the set.
#pragma once

#include <type_traits>

#include "ops/cpu/codes.h"
#include "ops/cpu/vec.h"
#include "ops/gemm/linear_cpu.h"

namespace hadal::ops::cpu::HADAL_ISA {

/// Two consecutive inputs of 16 outputs as floats.
struct FloatPair {
  F16 even, odd;
};

// --- products: how a pair of weights enters a sum, in kSteps steps with an operand and a row value
// each

/// FP32 weights: one element after the other.
struct OrderedProducts {
  using X = float;
  using Pair = FloatPair;
  using Operand = F16;
  static constexpr int kSteps = 2;
  HADAL_INLINE static Operand operand(const Pair& w, int step) {
    return step == 0 ? w.even : w.odd;
  }
  HADAL_INLINE static Operand row(const float* x, int step) { return splat(x[step]); }
  HADAL_INLINE static F16 add(F16 acc, const Operand& w, const Operand& x) {
    return fma(w, x, acc);
  }
};

/// BF16 values as floats: two fused multiply-adds, the odd element first.
struct FusedProducts : OrderedProducts {
  HADAL_INLINE static Operand operand(const Pair& w, int step) {
    return step == 0 ? w.odd : w.even;
  }
  HADAL_INLINE static Operand row(const float* x, int step) { return splat(x[1 - step]); }
#if defined(HADAL_ISA_avx512)
  HADAL_INLINE static Pair of(__m512i pairs) {
    const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
            { _mm512_castsi512_ps(_mm512_and_si512(pairs, high)) }};
  }
#endif
};

struct F32Weights : OrderedProducts {
  static constexpr int64_t kBytes = group_bytes(WeightFormat::kF32);
  static constexpr bool kDecodes = false;  ///< a group is an array of Pair as it lies in memory
  F32Weights(const GemmTask&, int64_t) {}
  HADAL_INLINE Pair pair(const uint8_t* group, int64_t j) const {
    const float* w = reinterpret_cast<const float*>(group) + j * 32;
    return {load(w), load(w + 16)};
  }
  HADAL_INLINE F16 scaled(F16 y, F16 slab, int64_t) const { return y + slab; }
};

// --- weight formats: how to get pair j of a group, how a slab is added

#if defined(HADAL_ISA_avx512)

/// vdpbf16ps, which does what FusedProducts does.
struct DotProducts {
  using X = uint16_t;
  struct Pair {
    __m512i v;
  };
  using Operand = Pair;
  static constexpr int kSteps = 1;
  HADAL_INLINE static Pair of(__m512i pairs) { return {pairs}; }
  HADAL_INLINE static Operand operand(const Pair& w, int) { return w; }
  HADAL_INLINE static Operand row(const uint16_t* x, int) {
    int32_t both;
    std::memcpy(&both, x, 4);
    return {_mm512_set1_epi32(both)};
  }
  HADAL_INLINE static F16 add(F16 acc, const Operand& w, const Operand& x) {
    return {
        _mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(w.v), reinterpret_cast<__m512bh>(x.v))};
  }
};

/// Zen runs vdpbf16ps at the rate of an FMA, which does half its work. Xeons with AMX
/// run four FMAs in its time (measured: 0.55 ns against 0.13 ns), so that FMAs are twice as fast.
/// One row has to decode as many weights as it multiplies; there the dot product leaves the other
/// units to that.
inline bool dot_products_are_fast() {
  static const bool fast = [] {
    __builtin_cpu_init();
    return __builtin_cpu_is("intel") == 0;
  }();
  return fast;
}

template <typename Products>
struct Bf16Weights : Products {
  static constexpr int64_t kBytes = group_bytes(WeightFormat::kBf16);
  static constexpr bool kDecodes = std::is_same_v<Products, FusedProducts>;
  Bf16Weights(const GemmTask&, int64_t) {}
  HADAL_INLINE typename Products::Pair pair(const uint8_t* group, int64_t j) const {
    return Products::of(_mm512_loadu_si512(group + j * 64));
  }
  HADAL_INLINE F16 scaled(F16 y, F16 slab, int64_t) const { return y + slab; }
};

/// The BF16 value of every E4M3 magnitude but NaN.
struct E4m3Table {
  alignas(64) uint16_t bits[128];
  constexpr E4m3Table() : bits() {
    for (int m = 0; m < 128; ++m) {
      int value = (m << 4) + (120 << 7);
      if (m < 8) {  // m * 2^-9
        const int top = m >= 4 ? 2 : m >= 2 ? 1 : 0;
        value = m == 0 ? 0 : (118 + top) << 7 | ((m << (7 - top)) & 0x7f);
      }
      bits[m] = static_cast<uint16_t>(value);
    }
  }
};
inline constexpr E4m3Table kE4m3{};

/// Look-ups by the code's seven bits, the low and the high byte apart; the scale is in the table.
template <typename Products>
struct Fp8Weights : Products {
  static constexpr int64_t kBytes = group_bytes(WeightFormat::kFp8);
  static constexpr bool kDecodes = true;

  HADAL_INLINE Fp8Weights(const GemmTask& t, int64_t k) : Fp8Weights(t.scales[k / 128]) {}
  HADAL_INLINE explicit Fp8Weights(uint8_t scale) {
    const __m512i exponent =
        _mm512_set1_epi16(static_cast<short>((static_cast<int>(scale) - 127) << 7));
    for (int half = 0; half < 2; ++half) {
      __m256i low[2], high[2];
      for (int i = 0; i < 2; ++i) {
        __m512i bits = _mm512_load_si512(kE4m3.bits + (half * 2 + i) * 32);
        // Zero, the very first entry, stays zero.
        const __mmask32 nonzero = half + i == 0 ? 0xfffffffeu : 0xffffffffu;
        bits = _mm512_mask_add_epi16(bits, nonzero, bits, exponent);
        low[i] = _mm512_cvtepi16_epi8(bits);
        high[i] = _mm512_cvtepi16_epi8(_mm512_srli_epi16(bits, 8));
      }
      low_[half] = _mm512_inserti64x4(_mm512_castsi256_si512(low[0]), low[1], 1);
      high_[half] = _mm512_inserti64x4(_mm512_castsi256_si512(high[0]), high[1], 1);
    }
  }
  HADAL_INLINE typename Products::Pair pair(const uint8_t* group, int64_t j) const {
    const __m512i v = _mm512_loadu_si512(group + j / 2 * 64);
    const __m512i low = _mm512_permutex2var_epi8(low_[0], v, low_[1]);
    const __m512i magnitude = _mm512_permutex2var_epi8(high_[0], v, high_[1]);
    // magnitude | (v & 0x80), then the bytes of a value side by side
    const __m512i high =
        _mm512_ternarylogic_epi32(magnitude, v, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    const __m512i mask = _mm512_set1_epi16(0x00ff);
    return Products::of(
        j % 2 == 0 ? _mm512_ternarylogic_epi32(mask, low, _mm512_slli_epi16(high, 8), 0xca)
                   : _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low, 8), high, 0xca));
  }
  HADAL_INLINE F16 scaled(F16 y, F16 slab, int64_t) const { return y + slab; }

 private:
  __m512i low_[2], high_[2];
};

/// Look-ups of 16-bit lanes by their low five bits; the fifth is a neighbour's, so the table
/// repeats.
template <typename Products>
struct Fp4Weights : Products {
  static constexpr int64_t kBytes = group_bytes(WeightFormat::kFp4);
  static constexpr bool kDecodes = true;
  HADAL_INLINE Fp4Weights(const GemmTask& t, int64_t k)
      : scales_(t.scales + k / 32 * t.panels * kPanelWidth),
        table_(_mm512_broadcast_i64x4(_mm256_setr_epi16(0x0000,
                                                        0x3f00,
                                                        0x3f80,
                                                        0x3fc0,
                                                        0x4000,
                                                        0x4040,
                                                        0x4080,
                                                        0x40c0,
                                                        static_cast<short>(0x8000),
                                                        static_cast<short>(0xbf00),
                                                        static_cast<short>(0xbf80),
                                                        static_cast<short>(0xbfc0),
                                                        static_cast<short>(0xc000),
                                                        static_cast<short>(0xc040),
                                                        static_cast<short>(0xc080),
                                                        static_cast<short>(0xc0c0)))) {}
  HADAL_INLINE typename Products::Pair pair(const uint8_t* group, int64_t j) const {
    const __m512i v = _mm512_loadu_si512(group);
    const __m512i codes = j == 0 ? v : _mm512_srli_epi16(v, static_cast<unsigned>(4 * j));
    return Products::of(_mm512_permutexvar_epi16(codes, table_));
  }
  HADAL_INLINE F16 scale(int64_t panel) const {
    const __m128i bytes =
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales_ + panel * kPanelWidth));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23))};
  }
  HADAL_INLINE F16 scaled(F16 y, F16 slab, int64_t panel) const {
    return {_mm512_fmadd_ps(slab.v, scale(panel).v, y.v)};
  }

 private:
  const uint8_t* scales_;
  __m512i table_;
};

#else

/// One op on the 16 dwords at p, giving 16 floats.
template <typename Op>
HADAL_INLINE F16 each_dword(const uint8_t* p, Op op) {
#if defined(HADAL_ISA_avx2)
  return {op(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))),
          op(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32)))};
#else
  F16 result;
  for (int i = 0; i < 16; ++i) {
    uint32_t word;
    std::memcpy(&word, p + 4 * i, 4);
    result.v[i] = op(word);
  }
  return result;
#endif
}

#if defined(HADAL_ISA_avx2)
HADAL_INLINE __m256 even_bf16(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
HADAL_INLINE __m256 odd_bf16(__m256i v) {
  return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
#else
HADAL_INLINE float even_bf16(uint32_t v) { return bits_float(v << 16); }
HADAL_INLINE float odd_bf16(uint32_t v) { return bits_float(v & 0xffff0000u); }
#endif

template <typename Products>
struct Bf16Weights : Products {
  static constexpr int64_t kBytes = group_bytes(WeightFormat::kBf16);
  static constexpr bool kDecodes = true;
  Bf16Weights(const GemmTask&, int64_t) {}
  HADAL_INLINE FloatPair pair(const uint8_t* group, int64_t j) const {
    return {each_dword(group + j * 64, [](auto v) { return even_bf16(v); }),
            each_dword(group + j * 64, [](auto v) { return odd_bf16(v); })};
  }
  HADAL_INLINE F16 scaled(F16 y, F16 slab, int64_t) const { return y + slab; }
};

template <typename Products>
struct Fp8Weights : Products {
  static constexpr int64_t kBytes = group_bytes(WeightFormat::kFp8);
  static constexpr bool kDecodes = true;
  HADAL_INLINE Fp8Weights(const GemmTask& t, int64_t k) : Fp8Weights(t.scales[k / 128]) {}
  HADAL_INLINE explicit Fp8Weights(uint8_t scale)
      : scale_(bits_float(static_cast<uint32_t>(scale) << 23)) {}
  HADAL_INLINE FloatPair pair(const uint8_t* group, int64_t j) const {
    const uint8_t* half = group + j / 2 * 64;
    const int shift = static_cast<int>(j % 2 * 8);
    const F16 scale = splat(scale_);
    return {each_dword(half, [&](auto v) { return e4m3(v, shift); }) * scale,
            each_dword(half, [&](auto v) { return e4m3(v, shift + 16); }) * scale};
  }
  HADAL_INLINE F16 scaled(F16 y, F16 slab, int64_t) const { return y + slab; }

 private:
  float scale_;
};

template <typename Products>
struct Fp4Weights : Products {
  static constexpr int64_t kBytes = group_bytes(WeightFormat::kFp4);
  static constexpr bool kDecodes = true;
  HADAL_INLINE Fp4Weights(const GemmTask& t, int64_t k)
      : scales_(t.scales + k / 32 * t.panels * kPanelWidth) {}
  HADAL_INLINE FloatPair pair(const uint8_t* group, int64_t j) const {
    const int shift = static_cast<int>(4 * j);
    return {each_dword(group, [&](auto v) { return e2m1(v, shift); }),
            each_dword(group, [&](auto v) { return e2m1(v, shift + 16); })};
  }
  HADAL_INLINE F16 scaled(F16 y, F16 slab, int64_t panel) const {
    float scale[16];
    for (int i = 0; i < 16; ++i)
      scale[i] = bits_float(static_cast<uint32_t>(scales_[panel * kPanelWidth + i]) << 23);
    return fma(slab, load(scale), y);
  }

 private:
  const uint8_t* scales_;
};

#endif

/// Codes as they are, and a factor of any value for the slab's sum.
template <typename Products>
struct Fp8FactorWeights : Fp8Weights<Products> {
  HADAL_INLINE Fp8FactorWeights(const GemmTask& t, int64_t k)
      : Fp8Weights<Products>(uint8_t{127}), factor_(t.factors[k / 128]) {}
  HADAL_INLINE F16 scaled(F16 y, F16 slab, int64_t) const { return fma(slab, splat(factor_), y); }

 private:
  float factor_;
};

}  // namespace hadal::ops::cpu::HADAL_ISA
