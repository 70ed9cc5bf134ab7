#include "ops/moe/swiglu_backward_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

/// Gradients of clamped values are 0 beyond the limit and pass at it.
template <typename T>
void swiglu_backward_typed(const SwigluBackwardCpuParams& p, int64_t begin, int64_t end) {
  const F16 high = cpu::splat(p.limit), low = cpu::splat(-p.limit), one = cpu::splat(1.0f),
            zero = cpu::splat(0.0f);
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.inter;
    const T* up = static_cast<const T*>(p.up) + row * p.inter;
    const T* grad = static_cast<const T*>(p.grad_out) + row * p.inter;
    T* grad_gate = static_cast<T*>(p.grad_gate) + row * p.inter;
    T* grad_up = static_cast<T*>(p.grad_up) + row * p.inter;
    const F16 weight = cpu::splat(p.weight == nullptr ? 1.0f : p.weight[row]);
    F16 along = zero;
    cpu::for_lanes(p.inter, [&](int64_t i, int64_t n) {
      const F16 raw_gate = cpu::load_n(gate + i, n), raw_up = cpu::load_n(up + i, n);
      const F16 g = cpu::min(raw_gate, high), u = cpu::min(cpu::max(raw_up, low), high);
      const F16 dh = cpu::load_n(grad + i, n), s = cpu::sigmoid(g), silu = g * s;
      along = cpu::fma(dh, silu * u, along);
      const F16 d = weight * dh;
      // (g s)' = s (1 + g (1 - s))
      const F16 dg = d * u * (s * cpu::fma(g, one - s, one)), du = d * silu;
      cpu::store_n(grad_gate + i, cpu::if_less(high, raw_gate, zero, dg), n);
      cpu::store_n(grad_up + i,
                   cpu::if_less(high, raw_up, zero, cpu::if_less(raw_up, low, zero, du)), n);
    });
    if (p.grad_weight != nullptr) p.grad_weight[row] = cpu::sum(along);
  }
}

void swiglu_backward_rows(const SwigluBackwardCpuParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) {
    swiglu_backward_typed<float>(p, begin, end);
  } else {
    swiglu_backward_typed<uint16_t>(p, begin, end);
  }
}

const bool filled = swiglu_backward_cpu.fill(cpu::kIsa, swiglu_backward_rows);

}  // namespace
}  // namespace hadal::ops
