// The kernels of panel_gemm.h, compiled once per instruction set.
#include "ops/cpu/simd.h"
#include "ops/gemm/panel_gemm.h"

namespace hadal::gemm {
namespace {
using namespace hadal::simd;  // NOLINT: the vectors of this instruction set
using detail::BlockLayout;
using detail::Tile;

// --- pairs of weights: what one step of the tree takes
// --------------------------------------------
struct PairF32 {
  F16 even, odd;
};
HADAL_INLINE F16 dot(F16 acc, const PairF32& w, const float* x) {
  return fma(w.even, broadcast(x[0]), fma(w.odd, broadcast(x[1]), acc));
}

HADAL_INLINE float fp8_value(uint32_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const float value = magnitude < 8 ? static_cast<float>(magnitude) * 0x1p-9f
                                    : bits_float((magnitude << 20) + (120u << 23));
  return bits_float(float_bits(value) | (code & 0x80u) << 24);
}
HADAL_INLINE float fp4_value(uint32_t code) {
  const uint32_t m = code & 7u;
  const float value = m < 2 ? 0.5f * static_cast<float>(m) : bits_float((m << 22) + (126u << 23));
  return bits_float(float_bits(value) | (code & 8u) << 28);
}

/// The pair `p` of one panel and slab as floats.
template <WeightFormat kFormat>
HADAL_INLINE PairF32 load_pair_f32(const uint8_t* values, int64_t p) {
  if constexpr (kFormat == WeightFormat::kF32) {
    const auto* f = reinterpret_cast<const float*>(values) + p * 32;
    return {load(f), load(f + 16)};
  } else {
    float even[16], odd[16];
    for (int i = 0; i < 16; ++i) {
      uint32_t word;
      if constexpr (kFormat == WeightFormat::kBf16) {
        std::memcpy(&word, values + p * 64 + i * 4, 4);
        even[i] = bits_float(word << 16);
        odd[i] = bits_float(word & 0xffff0000u);
      } else if constexpr (kFormat == WeightFormat::kFp8) {
        std::memcpy(&word, values + p / 2 * 64 + i * 4, 4);
        word >>= p % 2 * 8;
        even[i] = fp8_value(word & 0xffu);
        odd[i] = fp8_value(word >> 16 & 0xffu);
      } else {
        std::memcpy(&word, values + p / 4 * 64 + i * 4, 4);
        word >>= p % 4 * 4;
        even[i] = fp4_value(word & 15u);
        odd[i] = fp4_value(word >> 16 & 15u);
      }
    }
    return {load(even), load(odd)};
  }
}

struct F32Mode {
  using X = float;
  using Pair = PairF32;
  static constexpr int kGroup = 1;
  template <WeightFormat kFormat>
  static HADAL_INLINE void decode(const uint8_t* values, int64_t p, Pair* out) {
    out[0] = load_pair_f32<kFormat>(values, p);
  }
  static HADAL_INLINE F16 step(F16 acc, const Pair& w, const float* x) { return dot(acc, w, x); }
};

#if defined(HADAL_ISA_avx512)
/// Both bytes of the BF16 value of every E4M3 magnitude.
struct Fp8Tables {
  alignas(64) uint8_t low[128], high[128];
  constexpr Fp8Tables() : low(), high() {
    for (int m = 0; m < 128; ++m) {
      int bits = (m << 4) + (120 << 7);
      if (m < 8) {
        int top = m >= 4 ? 2 : m >= 2 ? 1 : 0;
        bits = m == 0 ? 0 : ((118 + top) << 7) | ((m << (7 - top)) & 0x7f);
      }
      low[m] = static_cast<uint8_t>(bits & 0xff);
      high[m] = static_cast<uint8_t>(bits >> 8);
    }
  }
};
constexpr Fp8Tables kFp8{};

struct Bf16Mode {
  using X = uint16_t;
  using Pair = __m512i;
  static constexpr int kGroup = 4;
  template <WeightFormat kFormat>
  static HADAL_INLINE void decode(const uint8_t* values, int64_t p, Pair* out) {
    if constexpr (kFormat == WeightFormat::kBf16) {
      for (int j = 0; j < 4; ++j) out[j] = _mm512_loadu_si512(values + (p + j) * 64);
    } else if constexpr (kFormat == WeightFormat::kFp8) {
      for (int j = 0; j < 2; ++j) decode_fp8(values + (p / 2 + j) * 64, out + 2 * j);
    } else {
      // 16-bit look-ups by the low five bits; the fifth belongs to a neighbour, so the table
      // repeats.
      const __m256i codes = _mm256_setr_epi16(
          0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
          static_cast<short>(0x8000), static_cast<short>(0xbf00), static_cast<short>(0xbf80),
          static_cast<short>(0xbfc0), static_cast<short>(0xc000), static_cast<short>(0xc040),
          static_cast<short>(0xc080), static_cast<short>(0xc0c0));
      const __m512i table = _mm512_broadcast_i64x4(codes);
      const __m512i v = _mm512_loadu_si512(values + p / 4 * 64);
      out[0] = _mm512_permutexvar_epi16(v, table);
      out[1] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 4), table);
      out[2] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 8), table);
      out[3] = _mm512_permutexvar_epi16(_mm512_srli_epi16(v, 12), table);
    }
  }
  static HADAL_INLINE F16 step(F16 acc, const Pair& w, const uint16_t* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return {_mm512_dpbf16_ps(acc.v, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair))};
  }

 private:
  static HADAL_INLINE void decode_fp8(const uint8_t* bytes, Pair* out) {
    const __m512i v = _mm512_loadu_si512(bytes);
    const __m512i low =
        _mm512_permutex2var_epi8(_mm512_load_si512(kFp8.low), v, _mm512_load_si512(kFp8.low + 64));
    const __m512i magnitude = _mm512_permutex2var_epi8(_mm512_load_si512(kFp8.high), v,
                                                       _mm512_load_si512(kFp8.high + 64));
    // high = magnitude | (v & 0x80)
    const __m512i high =
        _mm512_ternarylogic_epi32(magnitude, v, _mm512_set1_epi8(static_cast<char>(0x80)), 0xf8);
    const __m512i mask = _mm512_set1_epi16(0x00ff);
    // mask ? a : b bit by bit
    out[0] = _mm512_ternarylogic_epi32(mask, low, _mm512_slli_epi16(high, 8), 0xca);
    out[1] = _mm512_ternarylogic_epi32(mask, _mm512_srli_epi16(low, 8), high, 0xca);
  }
};
#endif

template <WeightFormat kFormat>
HADAL_INLINE F16 load_scale(const uint8_t* scales) {
  if constexpr (kFormat == WeightFormat::kFp8) {
    float s;
    std::memcpy(&s, scales, 4);
    return broadcast(s);
  } else if constexpr (kFormat == WeightFormat::kFp4) {
#if defined(HADAL_ISA_avx512)
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(scales));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(b), 23))};
#else
    float s[16];
    for (int i = 0; i < 16; ++i) s[i] = bits_float(static_cast<uint32_t>(scales[i]) << 23);
    return load(s);
#endif
  } else {
    return broadcast(1.0f);
  }
}

void write_row(const GemmParams& p, int64_t row, int64_t column, F16 value) {
  const int64_t left = p.desc.n - column;
  const int count = left < 16 ? static_cast<int>(left) : 16;
  const int64_t at = row * p.y_stride + column;
  if (p.y_type == RowType::kF32) {
    store_partial(static_cast<float*>(p.y) + at, value, count);
    return;
  }
  uint16_t lanes[16];
  store_bf16(lanes, value);
  std::memcpy(static_cast<uint16_t*>(p.y) + at, lanes, static_cast<size_t>(count) * 2);
}

/// Few rows: weights are decoded in registers as they stream by.
template <class Mode, WeightFormat kFormat, int kRows, int kPanels>
void gemv(const Tile& t, const BlockLayout& layout) {
  const GemmParams& p = *t.params;
  const uint8_t* base = static_cast<const uint8_t*>(p.packed) + layout.offset;
  const auto* x = static_cast<const typename Mode::X*>(t.x);
  const int64_t pairs = p.desc.slab / 2;
  F16 y[kRows][kPanels];
  for (auto& row : y)
    for (auto& v : row) v = zero();
  for (int64_t s = 0; s < layout.slabs; ++s, base += layout.slab_bytes()) {
    F16 acc[kRows][kPanels];
    for (auto& row : acc)
      for (auto& v : row) v = zero();
    const auto* xs = x + s * p.desc.slab;
    for (int64_t at = 0; at < pairs; at += Mode::kGroup) {
#pragma GCC unroll 4
      for (int q = 0; q < kPanels; ++q) {
        const uint8_t* values = base + q * layout.value_bytes;
        typename Mode::Pair w[Mode::kGroup];
        Mode::template decode<kFormat>(values, at, w);
        __builtin_prefetch(values + at * layout.value_bytes / pairs + 4096);
#pragma GCC unroll 4
        for (int j = 0; j < Mode::kGroup; ++j)
#pragma GCC unroll 6
          for (int r = 0; r < kRows; ++r)
            acc[r][q] = Mode::step(acc[r][q], w[j], xs + r * t.x_stride + 2 * (at + j));
      }
    }
    const uint8_t* scales = base + kPanels * layout.value_bytes;
#pragma GCC unroll 4
    for (int q = 0; q < kPanels; ++q) {
      const F16 scale = load_scale<kFormat>(scales + q * layout.scale_bytes);
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) y[r][q] = fma(acc[r][q], scale, y[r][q]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int q = 0; q < kPanels; ++q)
      write_row(p, t.row0 + r, (t.block * detail::kBlockPanels + q) * 16, y[r][q]);
}

/// kRows rows against one decoded slab of kPanels panels: y += scale * slab sum.
template <class Mode, int kRows, int kPanels>
HADAL_INLINE void micro(const typename Mode::Pair* w,
                        const float* scales,
                        const typename Mode::X* x,
                        int64_t x_stride,
                        int64_t pairs,
                        float* y) {
  F16 acc[kRows][kPanels];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < kPanels; ++q) acc[r][q] = zero();
  for (int64_t at = 0; at < pairs; ++at)
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int q = 0; q < kPanels; ++q)
        acc[r][q] = Mode::step(acc[r][q], w[at * kPanels + q], x + r * x_stride + 2 * at);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int q = 0; q < kPanels; ++q) {
      float* out = y + r * 64 + q * 16;
      store(out, fma(acc[r][q], load(scales + q * 16), load(out)));
    }
}

/// Many rows: each slab is decoded once into the first-level cache and multiplied by all rows of
/// the tile.
template <class Mode, WeightFormat kFormat, int kPanels>
void many_rows(const Tile& t, const BlockLayout& layout) {
  const GemmParams& p = *t.params;
  const uint8_t* base = static_cast<const uint8_t*>(p.packed) + layout.offset;
  auto* panel = reinterpret_cast<typename Mode::Pair*>(t.scratch);
  float* scales = t.scratch + 64 * 128;
  float* y = scales + 64 * 8;
  std::memset(y, 0, static_cast<size_t>(t.rows) * 64 * 4);
  const auto* x = static_cast<const typename Mode::X*>(t.x);
  const int64_t pairs = p.desc.slab / 2;
  for (int64_t s = 0; s < layout.slabs; ++s, base += layout.slab_bytes()) {
    for (int q = 0; q < kPanels; ++q) {
      for (int64_t at = 0; at < pairs; at += Mode::kGroup) {
        typename Mode::Pair w[Mode::kGroup];
        Mode::template decode<kFormat>(base + q * layout.value_bytes, at, w);
        for (int j = 0; j < Mode::kGroup; ++j) panel[(at + j) * kPanels + q] = w[j];
      }
      store(scales + q * 16,
            load_scale<kFormat>(base + kPanels * layout.value_bytes + q * layout.scale_bytes));
    }
    const auto* xs = x + s * p.desc.slab;
    int64_t r = 0;
    for (; r + 6 <= t.rows; r += 6)
      micro<Mode, 6, kPanels>(panel, scales, xs + r * t.x_stride, t.x_stride, pairs, y + r * 64);
    for (; r < t.rows; ++r)
      micro<Mode, 1, kPanels>(panel, scales, xs + r * t.x_stride, t.x_stride, pairs, y + r * 64);
  }
  for (int64_t r = 0; r < t.rows; ++r)
    for (int q = 0; q < kPanels; ++q)
      write_row(p, t.row0 + r, (t.block * detail::kBlockPanels + q) * 16,
                load(y + r * 64 + q * 16));
}

template <class Mode, WeightFormat kFormat, int kPanels>
void by_rows(const Tile& t, const BlockLayout& layout) {
  switch (t.rows) {
    case 1:
      return gemv<Mode, kFormat, 1, kPanels>(t, layout);
    case 2:
      return gemv<Mode, kFormat, 2, kPanels>(t, layout);
    case 3:
      return gemv<Mode, kFormat, 3, kPanels>(t, layout);
    default:
      return many_rows<Mode, kFormat, kPanels>(t, layout);
  }
}

template <class Mode, WeightFormat kFormat>
void by_panels(const Tile& t) {
  const BlockLayout layout = detail::block_layout(t.params->desc, t.block);
  switch (layout.panels) {
    case 1:
      return by_rows<Mode, kFormat, 1>(t, layout);
    case 2:
      return by_rows<Mode, kFormat, 2>(t, layout);
    case 3:
      return by_rows<Mode, kFormat, 3>(t, layout);
    default:
      return by_rows<Mode, kFormat, 4>(t, layout);
  }
}

template <class Mode>
void by_format(const Tile& t) {
  switch (t.params->desc.format) {
    case WeightFormat::kF32:
      return by_panels<F32Mode, WeightFormat::kF32>(t);
    case WeightFormat::kBf16:
      return by_panels<Mode, WeightFormat::kBf16>(t);
    case WeightFormat::kFp8:
      return by_panels<Mode, WeightFormat::kFp8>(t);
    case WeightFormat::kFp4:
      return by_panels<Mode, WeightFormat::kFp4>(t);
  }
}

void run_tile(const Tile& t) {
  const FlushDenormals flush;
#if defined(HADAL_ISA_avx512)
  if (t.params->x_type == RowType::kBf16) return by_format<Bf16Mode>(t);
#endif
  by_format<F32Mode>(t);
}

void native_bf16(bool* yes) {
#if defined(HADAL_ISA_avx512)
  *yes = true;
#else
  *yes = false;
#endif
}

#if defined(HADAL_ISA_avx512)
constexpr Isa kIsa = Isa::kAvx512;
#elif defined(HADAL_ISA_avx2)
constexpr Isa kIsa = Isa::kAvx2;
#else
constexpr Isa kIsa = Isa::kPortable;
#endif
[[maybe_unused]] const bool filled =
    detail::tile_slot.fill(kIsa, run_tile) && detail::native_bf16_slot.fill(kIsa, native_bf16);

}  // namespace
}  // namespace hadal::gemm
