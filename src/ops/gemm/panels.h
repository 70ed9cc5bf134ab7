// Weights as the CPU's matrix kernel reads them: panels of 16 outputs, K in pairs.
//
// BF16: a panel is [K / 2][16][2], so that one 64-byte row feeds one pair step of 16 outputs; FP32:
// [K][16]. Outputs beyond `out` and an odd last K are zeros, which change no sum.
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

inline constexpr int64_t kPanelWidth = 16;

struct GemmCpuParams {
  const void* x;       ///< [rows, in] BF16 or FP32, like the panels
  const void* panels;  ///< [num_panels, padded K, 16]
  void* y;             ///< [rows, out]
  int64_t in, out;
  int64_t x_stride, y_stride;  ///< elements from row to row
  int64_t slab;                ///< even: K between additions into the output accumulator
  ElementType type;            ///< of x and panels
  ElementType result;          ///< of y: one rounding
};

/// Rows [row_begin, row_end) times panels [panel_begin, panel_end). One tree for every shape of the
/// task: per output and slab one FP32 accumulator, K ascending in pairs, the odd element of a pair
/// first (as vdpbf16ps adds), slabs added in order. Subnormals are flushed to zero, as that
/// instruction does.
extern CpuSlot<void(const GemmCpuParams&, int64_t, int64_t, int64_t, int64_t)> gemm_cpu;

/// Elements of one packed matrix.
constexpr int64_t packed_panel_elements(int64_t out, int64_t in) {
  return (out + kPanelWidth - 1) / kPanelWidth * kPanelWidth * ((in + 1) / 2 * 2);
}

}  // namespace hadal::ops
