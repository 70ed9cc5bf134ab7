#include "ops/gemm/linear_cpu.h"

#include <type_traits>

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

/// Far enough ahead of one row's decoding, measured against 0.5, 2 and 4 KiB.
constexpr int64_t kPrefetchBytes = 1024;

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
            __builtin_prefetch(group + kPrefetchBytes + line);
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
      return by_panels<cpu::Fp8Weights<Products>>(t);
    case WeightFormat::kFp4:
      return by_panels<cpu::Fp4Weights<Products>>(t);
  }
}

void gemm(const GemmTask& t) {
  const FlushSubnormals flush;
  static_cast<void>(flush);
#if defined(HADAL_ISA_avx512)
  if (t.x_type == ElementType::kBf16) return by_format<cpu::DotProducts>(t);
#endif
  by_format<cpu::FusedProducts>(t);
}

void takes_bf16_rows([[maybe_unused]] int64_t rows, bool* yes) {
#if defined(HADAL_ISA_avx512)
  *yes = rows == 1 || cpu::dot_products_are_fast();
#else
  *yes = false;
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
  auto* out = static_cast<To*>(p.packed);
  for (int64_t k = 0; k < p.in; k += p.slab) {
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
}

const bool filled = gemm_cpu.fill(cpu::kIsa, gemm) && pack_rows_cpu.fill(cpu::kIsa, pack_rows) &&
                    gemm_takes_bf16_rows_cpu.fill(cpu::kIsa, takes_bf16_rows);

}  // namespace
}  // namespace hadal::ops
