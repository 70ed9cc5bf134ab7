#include "ops/mhc/hyper_connection_backward_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

constexpr int kStreams = 4;

template <typename T>
void post_token(const HcPostBackwardCpuParams& p, int64_t token) {
  const T* out = static_cast<const T*>(p.out) + token * p.dim;
  const T* streams = static_cast<const T*>(p.streams) + token * kStreams * p.dim;
  const T* d_result = static_cast<const T*>(p.d_result) + token * kStreams * p.dim;
  T* d_out = static_cast<T*>(p.d_out) + token * p.dim;
  T* d_streams = static_cast<T*>(p.d_streams) + token * kStreams * p.dim;
  const float* post = p.post + token * kStreams;
  const float* comb = p.comb + token * kStreams * kStreams;
  F16 at_post[kStreams], at_comb[kStreams][kStreams];
  for (int k = 0; k < kStreams; ++k) {
    at_post[k] = cpu::splat(0.0f);
    for (int j = 0; j < kStreams; ++j) at_comb[j][k] = cpu::splat(0.0f);
  }
  cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
    const F16 f = cpu::load_n(out + i, n);
    F16 grad[kStreams];
    F16 through = cpu::splat(0.0f);
#pragma GCC unroll 4
    for (int k = 0; k < kStreams; ++k) {
      grad[k] = cpu::load_n(d_result + k * p.dim + i, n);
      at_post[k] = cpu::fma(f, grad[k], at_post[k]);
      through = cpu::fma(cpu::splat(post[k]), grad[k], through);
    }
    cpu::store_n(d_out + i, through, n);
#pragma GCC unroll 4
    for (int j = 0; j < kStreams; ++j) {
      const F16 old = cpu::load_n(streams + j * p.dim + i, n);
      F16 carried = cpu::splat(0.0f);
#pragma GCC unroll 4
      for (int k = 0; k < kStreams; ++k) {
        at_comb[j][k] = cpu::fma(old, grad[k], at_comb[j][k]);
        carried = cpu::fma(cpu::splat(comb[j * kStreams + k]), grad[k], carried);
      }
      cpu::store_n(d_streams + j * p.dim + i, carried, n);
    }
  });
  for (int k = 0; k < kStreams; ++k) {
    p.d_post[token * kStreams + k] = cpu::sum(at_post[k]);
    for (int j = 0; j < kStreams; ++j)
      p.d_comb[(token * kStreams + j) * kStreams + k] = cpu::sum(at_comb[j][k]);
  }
}

template <typename T>
void dots_token(const HcPreDotsCpuParams& p, int64_t token) {
  const int64_t width = kStreams * p.dim;
  const T* streams = static_cast<const T*>(p.streams) + token * width;
  const T* d_mixed = static_cast<const T*>(p.d_mixed) + token * p.dim;
  float* flat = p.flat + token * width;
  cpu::for_lanes(
      width, [&](int64_t i, int64_t n) { cpu::store_n(flat + i, cpu::load_n(streams + i, n), n); });
  const float mean = cpu::dot(flat, flat, width) / static_cast<float>(width);
  p.rho[token] = 1.0f / __builtin_sqrtf(mean + p.norm_eps);
  for (int j = 0; j < kStreams; ++j)
    p.d_pre[token * kStreams + j] = cpu::dot(d_mixed, flat + j * p.dim, p.dim);
}

template <typename T>
void streams_token(const HcPreStreamsCpuParams& p, int64_t token) {
  const int64_t width = kStreams * p.dim;
  const T* d_mixed = static_cast<const T*>(p.d_mixed) + token * p.dim;
  T* d_streams = static_cast<T*>(p.d_streams) + token * width;
  const F16 factor = cpu::splat(-p.v_factor[token]);
  for (int j = 0; j < kStreams; ++j) {
    const F16 pre = cpu::splat(p.pre[token * kStreams + j]);
    const int64_t first = token * width + j * p.dim;
    cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
      const F16 logits = cpu::load_n(p.through_logits + first + i, n);
      const F16 grad = cpu::fma(factor, cpu::load_n(p.flat + first + i, n),
                                cpu::fma(pre, cpu::load_n(d_mixed + i, n), logits));
      cpu::store_n(d_streams + j * p.dim + i, grad, n);
    });
  }
}

void post_tokens(const HcPostBackwardCpuParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    if (p.dtype == ElementType::kF32) {
      post_token<float>(p, token);
    } else {
      post_token<uint16_t>(p, token);
    }
  }
}

void dots_tokens(const HcPreDotsCpuParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    if (p.dtype == ElementType::kF32) {
      dots_token<float>(p, token);
    } else {
      dots_token<uint16_t>(p, token);
    }
  }
}

void streams_tokens(const HcPreStreamsCpuParams& p, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    if (p.dtype == ElementType::kF32) {
      streams_token<float>(p, token);
    } else {
      streams_token<uint16_t>(p, token);
    }
  }
}

const bool filled = hc_post_backward_cpu.fill(cpu::kIsa, post_tokens) &&
                    hc_pre_dots_cpu.fill(cpu::kIsa, dots_tokens) &&
                    hc_pre_streams_cpu.fill(cpu::kIsa, streams_tokens);

}  // namespace
}  // namespace hadal::ops
