// CPU kernel contracts of the hyper-connections (hyper_connection.h).
#pragma once

#include <cstdint>

#include "base/cpu.h"
#include "ops/cpu/element_type.h"

namespace hadal::ops {

inline constexpr int64_t kHcMaxStreams = 8;

struct HcPreCpuParams {
  const void* streams;  ///< [tokens, n, dim]
  const float* fn;      ///< [(2 + n) n, n dim], or [n, n dim] for the head
  const float* base;    ///< [(2 + n) n] or [n]
  const float* scale;   ///< [3] or [1]
  void* mixed;          ///< [tokens, dim], the streams' dtype
  float* post;          ///< [tokens, n]; unused for the head
  float* comb;          ///< [tokens, n, n]; unused for the head
  int64_t n, dim, sinkhorn_iters;
  float norm_eps, hc_eps;
  ElementType dtype;
  bool head;  ///< collapse weights only
};

struct HcPostCpuParams {
  const void* out;      ///< [tokens, dim]
  const void* streams;  ///< [tokens, n, dim]
  const float* post;    ///< [tokens, n]
  const float* comb;    ///< [tokens, n, n]
  void* result;         ///< [tokens, n, dim]
  int64_t n, dim;
  ElementType dtype;
};

/// Tokens [begin, end).
extern CpuSlot<void(const HcPreCpuParams&, int64_t, int64_t)> hc_pre_cpu;
extern CpuSlot<void(const HcPostCpuParams&, int64_t, int64_t)> hc_post_cpu;

}  // namespace hadal::ops
