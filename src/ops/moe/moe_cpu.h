// CPU kernel contracts of SwiGLU and of the sum over a token's experts (swiglu.h, permute.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

struct SwigluCpuParams {
  const void *gate, *up;  ///< [rows, inter]
  const float* weight;    ///< [rows]; null: none
  void* out;              ///< [rows, inter]
  int64_t inter;
  float limit;
  ElementType dtype;
};

struct CombineCpuParams {
  const void* rows;      ///< [pairs, dim] in expert order
  const int64_t* place;  ///< [tokens * topk] row of each slot, experts ascending within a token
  const void* shared;    ///< [tokens, dim]
  void* out;             ///< [tokens, dim]
  int64_t topk, dim;
  ElementType dtype;
};

/// Rows, tokens [begin, end).
extern CpuSlot<void(const SwigluCpuParams&, int64_t, int64_t)> swiglu_cpu;
extern CpuSlot<void(const CombineCpuParams&, int64_t, int64_t)> combine_cpu;

}  // namespace hadal::ops
