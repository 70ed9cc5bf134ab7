#include "ops/gemm/linear_cpu.h"

#include <type_traits>

#if defined(HADAL_ISA_avx512)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"
#include "ops/gemm/weight_formats.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

/// Flush-to-zero for the lifetime of the object, so that every instruction set treats subnormals
/// alike.
class FlushSubnormals {
#if defined(HADAL_ISA_avx512) || defined(HADAL_ISA_avx2) || defined(__SSE2__)
 public:
  FlushSubnormals() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8040u); }
  ~FlushSubnormals() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

// --- the two ways to walk a block

#if defined(HADAL_ISA_avx512)
constexpr int kTilePanels = 4, kTileRows = 6;  // 24 accumulators of 32 registers
#elif defined(HADAL_ISA_avx2)
constexpr int kTilePanels = 1, kTileRows = 4;  // 8 of 16
#else
constexpr int kTilePanels = 1, kTileRows = 2;
#endif

/// Far enough ahead of one row's decoding (92 % of the read rate, 1 KiB gives 87 %), and into the
/// second-level cache: the first has too few buffers for what is under way from memory.
constexpr int64_t kPrefetchBytes = 4096;

HADAL_INLINE int64_t slab_groups(const GemmTask& t, int64_t k) {
  return (t.in - k < t.slab ? t.in - k : t.slab) / kGroupInputs;
}

HADAL_INLINE void store_outputs(const GemmTask& t, int64_t row, int64_t panel, F16 y) {
  const int64_t first = panel * kPanelWidth;
  const int64_t count = t.outputs - first < kPanelWidth ? t.outputs - first : kPanelWidth;
  if (t.result == ElementType::kF32) {
    cpu::store_n(static_cast<float*>(t.y) + row * t.y_row + first, y, count);
  } else {
    cpu::store_n(static_cast<uint16_t*>(t.y) + row * t.y_row + first, y, count);
  }
}

/// Few rows: weights are decoded in registers as they stream by, kTile panels at a time.
template <typename W, int kRows, int kTile>
void few_rows(const GemmTask& t) {
  const int64_t panels = kTile == kBlockPanels ? kTile : t.panels;
  const auto* x = static_cast<const typename W::X*>(t.x);
  const uint8_t* weights = t.weights;
  F16 y[kRows][kBlockPanels];
  for (auto& row : y) {
    for (F16& v : row) v = cpu::splat(0.0f);
  }
  for (int64_t k = 0; k < t.in; k += t.slab, x += t.x_slab) {
    const int64_t groups = slab_groups(t, k);
    const W w(t, k);
    for (int64_t first = 0; first < panels; first += kTile) {
      F16 acc[kRows][kTile];
      for (auto& row : acc) {
        for (F16& v : row) v = cpu::splat(0.0f);
      }
      for (int64_t g = 0; g < groups; ++g) {
#pragma GCC unroll 4
        for (int q = 0; q < kTile; ++q) {
          const uint8_t* group = weights + (g * panels + first + q) * W::kBytes;
          for (int64_t line = 0; line < W::kBytes; line += 64)
            __builtin_prefetch(group + kPrefetchBytes + line, 0, 2);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) {
            const typename W::Pair pair = w.pair(group, j);
            const typename W::X* xs = x + g * kGroupInputs + 2 * j;
#pragma GCC unroll 2
            for (int step = 0; step < W::kSteps; ++step) {
              const typename W::Operand operand = W::operand(pair, step);
#pragma GCC unroll 4
              for (int r = 0; r < kRows; ++r)
                acc[r][q] = W::add(acc[r][q], operand, W::row(xs + r * t.x_row, step));
            }
          }
        }
      }
      for (int r = 0; r < kRows; ++r) {
        for (int q = 0; q < kTile; ++q)
          y[r][first + q] = w.scaled(y[r][first + q], acc[r][q], first + q);
      }
    }
    weights += groups * panels * W::kBytes;
  }
  for (int r = 0; r < kRows; ++r) {
    for (int64_t q = 0; q < panels; ++q) store_outputs(t, r, q, y[r][q]);
  }
}

/// One slab of kRows rows and kTile panels: y += slab sum.
///   pairs  [groups][panels][4], beginning at the first panel of the tile
template <typename W, int kRows, int kTile>
HADAL_INLINE void tile(const GemmTask& t,
                       const W& w,
                       const typename W::Pair* pairs,
                       int64_t panels,
                       int64_t groups,
                       int64_t first,
                       const typename W::X* x,
                       float* y) {
  F16 acc[kRows][kTile];
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < kTile; ++q) acc[r][q] = cpu::splat(0.0f);
  }
  for (int64_t g = 0; g < groups; ++g) {
    const typename W::Pair* group = pairs + g * panels * 4;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 2
      for (int step = 0; step < W::kSteps; ++step) {
        typename W::Operand operands[kTile];
#pragma GCC unroll 4
        for (int q = 0; q < kTile; ++q) operands[q] = W::operand(group[q * 4 + j], step);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          const auto row = W::row(x + r * t.x_row + g * kGroupInputs + 2 * j, step);
#pragma GCC unroll 4
          for (int q = 0; q < kTile; ++q) acc[r][q] = W::add(acc[r][q], operands[q], row);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int q = 0; q < kTile; ++q) {
      float* out = y + r * kBlockWidth + (first + q) * kPanelWidth;
      cpu::store(out, w.scaled(cpu::load(out), acc[r][q], first + q));
    }
  }
}

template <typename W, int kTile>
void tile_rows(const GemmTask& t,
               const W& w,
               const typename W::Pair* pairs,
               int64_t panels,
               int64_t groups,
               int64_t first,
               const typename W::X* x,
               float* y) {
  int64_t row = 0;
  const auto take = [&]<int kRows>(std::integral_constant<int, kRows>) {
    for (; row + kRows <= t.rows; row += kRows) {
      tile<W, kRows, kTile>(t, w, pairs, panels, groups, first, x + row * t.x_row,
                            y + row * kBlockWidth);
    }
  };
  take(std::integral_constant<int, kTileRows>{});
  if constexpr (kTileRows > 4) take(std::integral_constant<int, 4>{});
  if constexpr (kTileRows > 2) take(std::integral_constant<int, 2>{});
  take(std::integral_constant<int, 1>{});
}

/// Many rows: each slab is decoded once into the first-level cache and multiplied by all rows.
template <typename W, int kTile>
void many_rows(const GemmTask& t) {
  using Pair = typename W::Pair;
  constexpr int64_t kMaxGroups = 128 / kGroupInputs;
  alignas(64) float y[kTaskRows * kBlockWidth];
  alignas(64) Pair decoded[W::kDecodes ? kMaxGroups * kBlockPanels * 4 : 1];
  const int64_t panels = kTile == kBlockPanels ? kTile : t.panels;
  const auto* x = static_cast<const typename W::X*>(t.x);
  const uint8_t* weights = t.weights;
  std::memset(y, 0, static_cast<size_t>(t.rows * kBlockWidth) * sizeof(float));
  for (int64_t k = 0; k < t.in; k += t.slab, x += t.x_slab) {
    const int64_t groups = slab_groups(t, k);
    const W w(t, k);
    const Pair* pairs = decoded;
    if constexpr (W::kDecodes) {
      for (int64_t i = 0; i < groups * panels; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) decoded[i * 4 + j] = w.pair(weights + i * W::kBytes, j);
      }
    } else {
      pairs = reinterpret_cast<const Pair*>(weights);
    }
    for (int64_t first = 0; first < panels; first += kTile) {
      tile_rows<W, kTile>(t, w, pairs + first * 4, panels, groups, first, x, y);
    }
    weights += groups * panels * W::kBytes;
  }
  for (int64_t row = 0; row < t.rows; ++row) {
    for (int64_t q = 0; q < panels; ++q)
      store_outputs(t, row, q, cpu::load(y + row * kBlockWidth + q * kPanelWidth));
  }
}

#if defined(HADAL_ISA_avx512)

// --- matrix units (AMX), where the order of additions is of no account

/// Whether the processor has BF16 tiles and the system lets this process use them.
bool has_tiles() {
  static const bool usable = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
    constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kBitCounts = 1u << 12;
    if ((d & kBf16) == 0 || (d & kTile) == 0 || (c & kBitCounts) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return usable;
}

/// All eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

using Fp4Pairs = cpu::Fp4Weights<cpu::DotProducts>;

constexpr int64_t kUnitGroups = 32 / kGroupInputs, kUnitPairs = 16;
/// Slabs whose weights are decoded at a time: 16 KiB a panel.
constexpr int64_t kUnitSlabs = 8;
/// Slab sums on their way from tiles to registers.
constexpr int kSums = 4, kAhead = 2;

/// The sums of one slab and panel for the rows whose mark is not set, by the vector kernel.
///   pairs [16 pairs], x [16 rows] of the slab, sums [16 rows][16 outputs]
__attribute__((noinline)) void inexact_sums(
    const __m512i* pairs, const uint16_t* x, int64_t x_row, unsigned missing, float* sums) {
  for (; missing != 0; missing &= missing - 1) {
    const int64_t row = __builtin_ctz(missing);
    F16 acc = cpu::splat(0.0f);
    for (int64_t p = 0; p < kUnitPairs; ++p) {
      const auto value = Fp4Pairs::row(x + row * x_row + 2 * p, 0);
      acc = Fp4Pairs::add(acc, Fp4Pairs::operand({pairs[p]}, 0), value);
    }
    cpu::store(sums + row * kPanelWidth, acc);
  }
}

/// y [16 rows][16 outputs of one panel] += the slabs' sums times their scales, slab by slab.
///   pairs  [slabs][16 pairs], scales [slabs][16], marks [slabs] rows for the tiles (`tiles` apart)
__attribute__((target("amx-tile,amx-bf16"))) void tile_unit(const GemmTask& t,
                                                            int64_t slabs,
                                                            const __m512i* pairs,
                                                            const float* scales,
                                                            const uint16_t* x,
                                                            const uint16_t* marks,
                                                            int64_t tiles,
                                                            unsigned rows,
                                                            float* y) {
  alignas(64) float sums[kSums][kUnitRows * kPanelWidth];
  __m512 acc[kUnitRows];
#pragma GCC unroll 16
  for (int64_t r = 0; r < kUnitRows; ++r) acc[r] = _mm512_load_ps(y + r * kBlockWidth);
  const auto correct = [&](int64_t slab) __attribute__((always_inline)) {
    const unsigned missing = rows & ~unsigned{marks[slab * tiles]};
    if (__builtin_expect(missing != 0, 0)) {
      inexact_sums(pairs + slab * kUnitPairs, x + slab * t.x_slab, t.x_row, missing,
                   sums[slab % kSums]);
    }
  };
  const auto multiply = [&](int64_t slab)
      __attribute__((always_inline, target("amx-tile,amx-bf16"))) {
    if (slab % 2 == 0) {
      _tile_loadd(4, pairs + slab * kUnitPairs, 64);
      _tile_loadd(6, x + slab * t.x_slab, 64);
      _tile_zero(0);
      _tile_dpbf16ps(0, 6, 4);
      _tile_stored(0, sums[slab % kSums], 64);
    } else {
      _tile_loadd(5, pairs + slab * kUnitPairs, 64);
      _tile_loadd(7, x + slab * t.x_slab, 64);
      _tile_zero(1);
      _tile_dpbf16ps(1, 7, 5);
      _tile_stored(1, sums[slab % kSums], 64);
    }
    correct(slab);
  };
  const auto add = [&](int64_t slab) __attribute__((always_inline)) {
    const __m512 scale = _mm512_load_ps(scales + slab * kPanelWidth);
    const float* sum = sums[slab % kSums];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kUnitRows; ++r)
      acc[r] = _mm512_fmadd_ps(_mm512_load_ps(sum + r * kPanelWidth), scale, acc[r]);
  };
  // A tile's sums reach memory late: they are added while the next slabs are at work.
  const auto walk = [&](int64_t count) __attribute__((always_inline, target("amx-tile,amx-bf16"))) {
#pragma GCC unroll 32
    for (int64_t slab = 0; slab < count + kAhead; ++slab) {
      if (slab < count) multiply(slab);
      if (slab >= kAhead) add(slab - kAhead);
    }
  };
  if (slabs == kUnitSlabs) {
    walk(kUnitSlabs);
  } else {
    walk(slabs);
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < kUnitRows; ++r) _mm512_store_ps(y + r * kBlockWidth, acc[r]);
}

/// many_rows() for FP4 weights: marked rows go through tiles, 16 at a time, the others through the
/// vector kernel.
__attribute__((target("amx-tile,amx-bf16"))) void tile_unit_rows(const GemmTask& t) {
  alignas(64) float y[kTaskRows * kBlockWidth];
  alignas(64)
      __m512i decoded[kBlockPanels * kUnitSlabs * kUnitPairs];        // [panel][slab][pair][16][2]
  alignas(64) float scales[kBlockPanels * kUnitSlabs * kPanelWidth];  // [panel][slab][16]
  TileConfig config;
  // Sums (0, 1) and rows of x (6, 7): fewer rows take less time.
  const auto unit_rows = static_cast<uint8_t>(t.rows < kUnitRows ? t.rows : kUnitRows);
  for (const int unit : {0, 1, 6, 7}) config.rows[unit] = unit_rows;
  _tile_loadconfig(&config);
  const auto* x = static_cast<const uint16_t*>(t.x);
  const uint8_t* weights = t.weights;
  const uint16_t* exact = t.exact;
  const int64_t tiles = (t.rows + kUnitRows - 1) / kUnitRows;
  std::memset(y, 0, static_cast<size_t>(tiles * kUnitRows * kBlockWidth) * sizeof(float));
  for (int64_t k = 0; k < t.in; k += kUnitSlabs * t.slab) {
    const int64_t left = (t.in - k) / t.slab;
    const int64_t slabs = left < kUnitSlabs ? left : kUnitSlabs;
    for (int64_t slab = 0; slab < slabs; ++slab) {
      const Fp4Pairs w(t, k + slab * t.slab);
      for (int64_t q = 0; q < t.panels; ++q)
        cpu::store(scales + (q * kUnitSlabs + slab) * kPanelWidth, w.scale(q));
      for (int64_t g = 0; g < kUnitGroups; ++g) {
        for (int64_t q = 0; q < t.panels; ++q, weights += Fp4Pairs::kBytes) {
          __builtin_prefetch(weights + kPrefetchBytes);
          __m512i* pairs = decoded + (q * kUnitSlabs + slab) * kUnitPairs + g * 4;
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) pairs[j] = w.pair(weights, j).v;
        }
      }
    }
    // The tile loads do not tell the compiler what they read.
    __asm__ volatile("" ::: "memory");
    for (int64_t q = 0; q < t.panels; ++q) {
      for (int64_t unit = 0; unit < tiles; ++unit) {
        const int64_t rows = t.rows - unit * kUnitRows;
        tile_unit(t, slabs, decoded + q * kUnitSlabs * kUnitPairs,
                  scales + q * kUnitSlabs * kPanelWidth, x + unit * kUnitRows * t.x_row,
                  exact + unit, tiles, rows < kUnitRows ? (1u << rows) - 1 : 0xffffu,
                  y + unit * kUnitRows * kBlockWidth + q * kPanelWidth);
      }
    }
    x += slabs * t.x_slab;
    exact += slabs * tiles;
  }
  _tile_release();
  for (int64_t row = 0; row < t.rows; ++row) {
    for (int64_t q = 0; q < t.panels; ++q)
      store_outputs(t, row, q, cpu::load(y + row * kBlockWidth + q * kPanelWidth));
  }
}

/// Whether 12 sum |x| <= 2^24 u over 32 values, u the smallest last set bit among them; see
/// RowPacking::exact. Not where values are so small that products may be subnormal, or no numbers.
__attribute__((target("avx512bitalg"))) inline bool sums_are_exact(const uint16_t* x) {
  const __m512i bits = _mm512_loadu_si512(x);
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi16(0x7fff));
  // Sums of pairs: exact products with one, rounded sums.
  const __m512 pairs = _mm512_dpbf16_ps(_mm512_setzero_ps(), reinterpret_cast<__m512bh>(magnitude),
                                        reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80)));
  // The last set bit of a value is 2^(exponent + zeros below it in the significand - 134).
  const __m512i ones = _mm512_set1_epi16(-1);
  const __m512i significand = _mm512_or_si512(magnitude, _mm512_set1_epi16(0x80));
  const __m512i zeros =
      _mm512_popcnt_epi16(_mm512_andnot_si512(significand, _mm512_add_epi16(significand, ones)));
  const __m512i last = _mm512_add_epi16(_mm512_srli_epi16(magnitude, 7), zeros);
  const __m512i lasts =
      _mm512_mask_mov_epi16(ones, _mm512_test_epi16_mask(magnitude, magnitude), last);
  const __m256i half =
      _mm256_min_epu16(_mm512_castsi512_si256(lasts), _mm512_extracti64x4_epi64(lasts, 1));
  const __m128i quarter =
      _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  const int smallest = _mm_extract_epi16(_mm_minpos_epu16(quarter), 0);
  if (smallest == 0xffff) return true;
  if (smallest < 34) return false;  // u < 2^-100
  // u 2^24; a sum is rounded six times, 2^-18 is more than that can make.
  const float limit =
      __builtin_bit_cast(float, static_cast<uint32_t>(smallest - 7) << 23) * 0x1p24f;
  const float bound = _mm512_reduce_add_ps(pairs) * (12.0f * (1.0f + 0x1p-18f));
  return bound <= limit && bound < 0x1p100f;
}

void mark_exact(const RowPacking& p) {
  const int64_t units = (p.rows + kUnitRows - 1) / kUnitRows;
  const auto* x = static_cast<const uint16_t*>(p.packed) + p.begin * p.rows;
  uint16_t* exact = p.exact + p.begin / p.slab * units;
  for (int64_t k = p.begin; k < p.end; k += p.slab, x += p.rows * p.slab) {
    for (int64_t first = 0; first < p.rows; first += kUnitRows) {
      const int64_t end = first + kUnitRows < p.rows ? first + kUnitRows : p.rows;
      unsigned marks = 0;
      for (int64_t row = first; row < end; ++row)
        marks |= static_cast<unsigned>(sums_are_exact(x + row * p.slab)) << (row - first);
      *exact++ = static_cast<uint16_t>(marks);
    }
  }
}

#endif

template <typename W, int kTile>
void by_rows(const GemmTask& t) {
  switch (t.rows) {
    case 1:
      return few_rows<W, 1, kTile>(t);
    case 2:
      return few_rows<W, 2, kTile>(t);
    case 3:
      return few_rows<W, 3, kTile>(t);
    case 4:
      return few_rows<W, 4, kTile>(t);
    default:
      return many_rows<W, kTile>(t);
  }
}

template <typename W>
void by_panels(const GemmTask& t) {
  if (t.panels % kTilePanels == 0) return by_rows<W, kTilePanels>(t);
  by_rows<W, 1>(t);
}

template <typename Products>
void by_format(const GemmTask& t) {
  switch (t.format) {
    case WeightFormat::kF32:
      return by_panels<cpu::F32Weights>(t);
    case WeightFormat::kBf16:
      return by_panels<cpu::Bf16Weights<Products>>(t);
    case WeightFormat::kFp8:
      if (t.factors != nullptr) return by_panels<cpu::Fp8FactorWeights<Products>>(t);
      return by_panels<cpu::Fp8Weights<Products>>(t);
    case WeightFormat::kFp4:
      return by_panels<cpu::Fp4Weights<Products>>(t);
  }
}

void gemm(const GemmTask& t) {
  const FlushSubnormals flush;
  static_cast<void>(flush);
#if defined(HADAL_ISA_avx512)
  if (t.exact != nullptr) return tile_unit_rows(t);
  if (t.x_type == ElementType::kBf16) return by_format<cpu::DotProducts>(t);
#endif
  by_format<cpu::FusedProducts>(t);
}

void row_form([[maybe_unused]] int64_t rows,
              [[maybe_unused]] WeightFormat format,
              [[maybe_unused]] RowForm* form) {
#if defined(HADAL_ISA_avx512)
  form->exact = format == WeightFormat::kFp4 && rows >= kFewRows && has_tiles();
  form->bf16 = form->exact || rows == 1 || cpu::dot_products_are_fast();
#endif
}

template <typename From, typename To>
void pack_row(const From* x, To* out, int64_t count) {
  if constexpr (sizeof(From) == sizeof(To)) {
    std::memcpy(out, x, static_cast<size_t>(count) * sizeof(From));
  } else {
    cpu::for_lanes(count,
                   [&](int64_t i, int64_t n) { cpu::store_n(out + i, cpu::load_n(x + i, n), n); });
  }
}

template <typename From, typename To>
void pack_typed(const RowPacking& p) {
  auto* out = static_cast<To*>(p.packed) + p.begin * p.rows;
  for (int64_t k = p.begin; k < p.end; k += p.slab) {
    const int64_t width = p.in - k < p.slab ? p.in - k : p.slab;
    for (int64_t row = 0; row < p.rows; ++row, out += p.slab) {
      pack_row(static_cast<const From*>(p.x) + row * p.x_row + k, out, width);
      for (int64_t i = width; i % kGroupInputs != 0; ++i) out[i] = 0;
    }
  }
}

void pack_rows(const RowPacking& p) {
  if (p.from == ElementType::kF32) return pack_typed<float, float>(p);
  if (p.to == ElementType::kF32) return pack_typed<uint16_t, float>(p);
  pack_typed<uint16_t, uint16_t>(p);
#if defined(HADAL_ISA_avx512)
  if (p.exact != nullptr) mark_exact(p);
#endif
}

const bool filled = gemm_cpu.fill(cpu::kIsa, gemm) && pack_rows_cpu.fill(cpu::kIsa, pack_rows) &&
                    gemm_row_form_cpu.fill(cpu::kIsa, row_form);

}  // namespace
}  // namespace hadal::ops
