#include "ops/norm/rms_norm_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

/// y = weight * (x * rsqrt(mean(x^2) + eps))
template <typename T>
void norm_row(const RmsNormCpuParams& p, const T* x, T* out) {
  F16 squares = cpu::splat(0.0f);
  cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
    const F16 v = cpu::load_n(x + i, n);
    squares = cpu::fma(v, v, squares);
  });
  const float mean = cpu::sum(squares) / static_cast<float>(p.dim);
  const F16 rstd = cpu::splat(1.0f / __builtin_sqrtf(mean + p.eps));
  cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
    F16 y = cpu::load_n(x + i, n) * rstd;
    if (p.weight != nullptr) y = cpu::load_n(p.weight + i, n) * y;
    cpu::store_n(out + i, y, n);
  });
}

/// q2 = bf16(q*q), s = bf16(mean q2), r = bf16(rsqrt(bf16(s + eps))), y = bf16(q*r)
void chain_row(const RmsNormCpuParams& p, const uint16_t* x, uint16_t* out) {
  F16 squares = cpu::splat(0.0f);
  cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
    const F16 v = cpu::load_n(x + i, n);
    squares = squares + cpu::round_bf16(v * v);
  });
  const auto round = [](float v) { return cpu::bf16_to_float(cpu::float_to_bf16(v)); };
  const float mean = round(cpu::sum(squares) / static_cast<float>(p.dim));
  const F16 rstd = cpu::splat(round(1.0f / __builtin_sqrtf(round(mean + p.eps))));
  cpu::for_lanes(
      p.dim, [&](int64_t i, int64_t n) { cpu::store_n(out + i, cpu::load_n(x + i, n) * rstd, n); });
}

void rms_norm_rows(const RmsNormCpuParams& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t offset = row * p.dim;
    if (p.dtype == ElementType::kF32) {
      norm_row(p, static_cast<const float*>(p.x) + offset, static_cast<float*>(p.out) + offset);
    } else if (p.bf16_chain) {
      chain_row(p, static_cast<const uint16_t*>(p.x) + offset,
                static_cast<uint16_t*>(p.out) + offset);
    } else {
      norm_row(p, static_cast<const uint16_t*>(p.x) + offset,
               static_cast<uint16_t*>(p.out) + offset);
    }
  }
}

/// dx = rho (w dy - x rho^2 mean(w dy x)),  dw = sum dy x rho
template <typename T>
void backward_rows(const RmsNormBackwardCpuParams& p, int64_t begin, int64_t end) {
  if (p.grad_weight != nullptr) {
    cpu::for_lanes(
        p.dim, [&](int64_t i, int64_t n) { cpu::store_n(p.grad_weight + i, cpu::splat(0.0f), n); });
  }
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(p.x) + row * p.dim;
    const T* grad = static_cast<const T*>(p.grad_out) + row * p.dim;
    T* out = static_cast<T*>(p.grad_x) + row * p.dim;
    const auto weighted = [&](int64_t i, int64_t n) {
      const F16 g = cpu::load_n(grad + i, n);
      return p.weight == nullptr ? g : g * cpu::load_n(p.weight + i, n);
    };
    F16 squares = cpu::splat(0.0f), along = cpu::splat(0.0f);
    cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
      const F16 v = cpu::load_n(x + i, n);
      squares = cpu::fma(v, v, squares);
      along = cpu::fma(v, weighted(i, n), along);
    });
    const float dim = static_cast<float>(p.dim);
    const float rho = 1.0f / __builtin_sqrtf(cpu::sum(squares) / dim + p.eps);
    const F16 scale = cpu::splat(rho);
    const F16 back = cpu::splat(-(rho * rho * (cpu::sum(along) / dim)));
    cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
      const F16 v = cpu::load_n(x + i, n);
      cpu::store_n(out + i, scale * cpu::fma(back, v, weighted(i, n)), n);
      if (p.grad_weight == nullptr) return;
      cpu::store_n(p.grad_weight + i,
                   cpu::fma(cpu::load_n(grad + i, n), v * scale, cpu::load_n(p.grad_weight + i, n)),
                   n);
    });
  }
}

void rms_norm_backward(const RmsNormBackwardCpuParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) {
    backward_rows<float>(p, begin, end);
  } else {
    backward_rows<uint16_t>(p, begin, end);
  }
}

const bool filled = rms_norm_cpu.fill(cpu::kIsa, rms_norm_rows);
const bool filled_backward = rms_norm_backward_cpu.fill(cpu::kIsa, rms_norm_backward);

}  // namespace
}  // namespace hadal::ops
