// CPU kernel contract of compress (compress.h): rows are found by pointer, so chunk and history
// look alike.
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace hadal::ops {

struct CompressCpuParams {
  /// [num_blocks * candidates] rows of kv and of score in fold order, already offset to the half
  /// that counts; null where there is no token (before position 0).
  const float* const* kv;
  const float* const* score;
  float* pooled;       ///< [num_blocks, d]
  int64_t candidates;  ///< ratio, or 2 * ratio for CSA
  int64_t d;
};

/// Blocks [begin, end).
extern CpuSlot<void(const CompressCpuParams&, int64_t, int64_t)> compress_cpu;

}  // namespace hadal::ops
