#include "ops/norm/rms_norm_backward_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

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

const bool filled = rms_norm_backward_cpu.fill(cpu::kIsa, rms_norm_backward);

}  // namespace
}  // namespace hadal::ops
