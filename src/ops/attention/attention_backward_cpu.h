// CPU kernel contract of the attention's gradient at its logits (sparse_attn_backward.cpp).
#pragma once

#include <cstdint>

#include "base/cpu.h"

namespace hadal::ops {

/// One query's row of logits over a tile of keys. A key is visible in [first, last) where
/// `chosen`, if there is one, is not 0.
struct LogitGradientRow {
  float* dot;             ///< [keys] q . key; becomes the probability, 0 where not visible
  float* grad;            ///< [keys] grad_out . key; becomes the gradient at q . key
  const uint8_t* chosen;  ///< [keys] or null
  int64_t first, last;
  float lse, delta;  ///< log-sum-exp of the logits; sum over channels of grad_out out
};

/// out[r] = sum over channels of a[r] b[r]; a, b [rows, dim].
extern CpuSlot<void(const float* a, const float* b, int64_t rows, int64_t dim, float* out)>
    row_dots_cpu;

///   p = exp(scale dot - lse),  ds = p (grad - delta) scale
extern CpuSlot<void(const LogitGradientRow&, int64_t keys, float scale)> logit_gradient_cpu;

}  // namespace hadal::ops
