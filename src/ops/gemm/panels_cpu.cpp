#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"
#include "ops/gemm/panels.h"

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

/// acc + w[odd] * x[odd] + w[even] * x[even] for 16 outputs; `pair` holds x's even element in its
/// low half.
HADAL_INLINE F16 pair_step(F16 acc, const uint16_t* w, uint32_t pair) {
#if defined(HADAL_ISA_avx512)
  return {_mm512_dpbf16_ps(acc.v, reinterpret_cast<__m512bh>(_mm512_loadu_si512(w)),
                           reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(pair))))};
#elif defined(HADAL_ISA_avx2)
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 16));
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256 odd = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(pair & 0xffff0000u)));
  const __m256 even = _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(pair << 16)));
  const auto step = [&](__m256 a, __m256i v) {
    a = _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_and_si256(v, mask)), odd, a);
    return _mm256_fmadd_ps(_mm256_castsi256_ps(_mm256_slli_epi32(v, 16)), even, a);
  };
  return {step(acc.lo, low), step(acc.hi, high)};
#else
  const float odd = cpu::bf16_to_float(static_cast<uint16_t>(pair >> 16));
  const float even = cpu::bf16_to_float(static_cast<uint16_t>(pair));
  for (int i = 0; i < 16; ++i) {
    acc.v[i] = __builtin_fmaf(cpu::bf16_to_float(w[2 * i + 1]), odd, acc.v[i]);
    acc.v[i] = __builtin_fmaf(cpu::bf16_to_float(w[2 * i]), even, acc.v[i]);
  }
  return acc;
#endif
}

struct Bf16Format {
  using T = uint16_t;
  static constexpr int64_t kStep = 2;
  HADAL_INLINE static F16 step(F16 acc, const T* panel, const T* x, int64_t k, int64_t in) {
    uint32_t pair = 0;
    std::memcpy(&pair, x + k, k + 1 < in ? 4 : 2);
    return pair_step(acc, panel + k * kPanelWidth, pair);
  }
};

struct F32Format {
  using T = float;
  static constexpr int64_t kStep = 1;
  HADAL_INLINE static F16 step(F16 acc, const T* panel, const T* x, int64_t k, int64_t) {
    return cpu::fma(cpu::load(panel + k * kPanelWidth), cpu::splat(x[k]), acc);
  }
};

HADAL_INLINE void store_outputs(const GemmCpuParams& p, int64_t row, int64_t panel, F16 acc) {
  const int64_t first = panel * kPanelWidth;
  const int64_t count = p.out - first < kPanelWidth ? p.out - first : kPanelWidth;
  if (p.result == ElementType::kF32) {
    cpu::store_n(static_cast<float*>(p.y) + row * p.y_stride + first, acc, count);
  } else {
    cpu::store_n(static_cast<uint16_t*>(p.y) + row * p.y_stride + first, acc, count);
  }
}

/// kRows rows times kPanels panels, each output with its own accumulators.
template <typename Format, int kRows, int kPanels>
void tile(const GemmCpuParams& p, int64_t row, int64_t panel) {
  using T = typename Format::T;
  const int64_t panel_elements = (p.in + 1) / 2 * 2 * kPanelWidth;
  const T* x[kRows];
  const T* w[kPanels];
  for (int r = 0; r < kRows; ++r) x[r] = static_cast<const T*>(p.x) + (row + r) * p.x_stride;
  for (int n = 0; n < kPanels; ++n)
    w[n] = static_cast<const T*>(p.panels) + (panel + n) * panel_elements;
  F16 acc[kRows][kPanels];
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kPanels; ++n) acc[r][n] = cpu::splat(0.0f);
  }
  for (int64_t begin = 0; begin < p.in; begin += p.slab) {
    const int64_t end = begin + p.slab < p.in ? begin + p.slab : p.in;
    F16 slab[kRows][kPanels];
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kPanels; ++n) slab[r][n] = cpu::splat(0.0f);
    }
    for (int64_t k = begin; k < end; k += Format::kStep) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int n = 0; n < kPanels; ++n)
          slab[r][n] = Format::step(slab[r][n], w[n], x[r], k, p.in);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kPanels; ++n) acc[r][n] = acc[r][n] + slab[r][n];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int n = 0; n < kPanels; ++n) store_outputs(p, row + r, panel + n, acc[r][n]);
  }
}

template <typename Format>
void gemm_typed(const GemmCpuParams& p,
                int64_t row_begin,
                int64_t row_end,
                int64_t panel_begin,
                int64_t panel_end) {
  int64_t panel = panel_begin;
  for (; panel + 4 <= panel_end; panel += 4) {
    int64_t row = row_begin;
    for (; row + 4 <= row_end; row += 4) tile<Format, 4, 4>(p, row, panel);
    for (; row < row_end; ++row) tile<Format, 1, 4>(p, row, panel);
  }
  for (; panel < panel_end; ++panel) {
    int64_t row = row_begin;
    for (; row + 4 <= row_end; row += 4) tile<Format, 4, 1>(p, row, panel);
    for (; row < row_end; ++row) tile<Format, 1, 1>(p, row, panel);
  }
}

void gemm(const GemmCpuParams& p,
          int64_t row_begin,
          int64_t row_end,
          int64_t panel_begin,
          int64_t panel_end) {
  const FlushSubnormals flush;
  static_cast<void>(flush);
  if (p.type == ElementType::kF32) {
    gemm_typed<F32Format>(p, row_begin, row_end, panel_begin, panel_end);
  } else {
    gemm_typed<Bf16Format>(p, row_begin, row_end, panel_begin, panel_end);
  }
}

const bool filled = gemm_cpu.fill(cpu::kIsa, gemm);

}  // namespace
}  // namespace hadal::ops
