// CPU kernel contract of the cross-entropy's rows (cross_entropy.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

struct CrossEntropyCpuParams {
  const float* logits;     ///< [rows, vocab]
  const int64_t* targets;  ///< [rows], -1: not scored
  float* loss;             ///< [rows] nats; 0 where not scored
  void* grad;              ///< [rows, vocab] softmax - one-hot, 0 where not scored; null: none
  int64_t vocab;
  ElementType grad_type;  ///< one rounding
};

/// Rows [begin, end). Lane i takes entries i, i + 16, ...; then the lanes.
extern CpuSlot<void(const CrossEntropyCpuParams&, int64_t, int64_t)> cross_entropy_cpu;

}  // namespace hadal::ops
