// CPU kernel contract of the Newton-Schulz iteration (newton_schulz.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace hadal::ops {

struct SchulzCoefficients {
  double a, b, c;
};
inline constexpr int kSchulzSteps = 10;
constexpr SchulzCoefficients schulz_coefficients(int step) {
  return step < 8 ? SchulzCoefficients{3.4445, -4.7750, 2.0315}
                  : SchulzCoefficients{2.0, -1.5, 0.5};
}

struct NewtonSchulzCpuParams {
  const float* u;  ///< [units, rows, cols]
  float* out;      ///< like u
  int64_t rows, cols;
  bool bf16;       ///< what stands between products is rounded to BF16
  bool bf16_rows;  ///< the matrix kernel takes rows in BF16
};

/// Units [begin, end), each by itself: products by gemm_cpu, slabs of 128.
extern CpuSlot<void(const NewtonSchulzCpuParams&, int64_t, int64_t)> newton_schulz_cpu;

}  // namespace hadal::ops
