// CPU kernel contracts of the hyper-connections' gradients, four streams
// (hyper_connection_backward.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

struct HcPostBackwardCpuParams {
  const void *out, *streams;  ///< [tokens, dim], [tokens, 4, dim]
  const float *post, *comb;   ///< [tokens, 4], [tokens, 4, 4]
  const void* d_result;       ///< [tokens, 4, dim]
  void *d_out, *d_streams;    ///< [tokens, dim], [tokens, 4, dim]
  float *d_post, *d_comb;     ///< [tokens, 4], [tokens, 4, 4]
  int64_t dim;
  ElementType dtype;
};

/// What the gates' gradient needs of a token.
struct HcPreDotsCpuParams {
  const void *streams, *d_mixed;  ///< [tokens, 4, dim], [tokens, dim]
  float* flat;                    ///< [tokens, 4 dim] the streams in FP32
  float* rho;                     ///< [tokens] reciprocal RMS
  float* d_pre;                   ///< [tokens, 4] at the collapse weights
  int64_t dim;
  float norm_eps;
  ElementType dtype;
};

/// d_streams = pre d_mixed + through_logits - v_factor flat
struct HcPreStreamsCpuParams {
  const float *flat, *through_logits;  ///< [tokens, 4 dim]
  const float *pre, *v_factor;         ///< [tokens, 4], [tokens]
  const void* d_mixed;                 ///< [tokens, dim]
  void* d_streams;                     ///< [tokens, 4, dim]
  int64_t dim;
  ElementType dtype;
};

/// Tokens [begin, end).
extern CpuSlot<void(const HcPostBackwardCpuParams&, int64_t, int64_t)> hc_post_backward_cpu;
extern CpuSlot<void(const HcPreDotsCpuParams&, int64_t, int64_t)> hc_pre_dots_cpu;
extern CpuSlot<void(const HcPreStreamsCpuParams&, int64_t, int64_t)> hc_pre_streams_cpu;

}  // namespace hadal::ops
