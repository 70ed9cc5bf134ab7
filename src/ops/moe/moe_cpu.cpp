#include "ops/moe/moe_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

/// h = weight * (g * sigmoid(g) * u), g = min(gate, limit), u = clamp(up, -limit, limit)
template <typename T>
void swiglu_typed(const SwigluCpuParams& p, int64_t begin, int64_t end) {
  const F16 high = cpu::splat(p.limit), low = cpu::splat(-p.limit);
  for (int64_t row = begin; row < end; ++row) {
    const T* gate = static_cast<const T*>(p.gate) + row * p.inter;
    const T* up = static_cast<const T*>(p.up) + row * p.inter;
    T* out = static_cast<T*>(p.out) + row * p.inter;
    cpu::for_lanes(p.inter, [&](int64_t i, int64_t n) {
      const F16 g = cpu::min(cpu::load_n(gate + i, n), high);
      const F16 u = cpu::min(cpu::max(cpu::load_n(up + i, n), low), high);
      F16 h = g * cpu::sigmoid(g) * u;
      if (p.weight != nullptr) h = cpu::splat(p.weight[row]) * h;
      cpu::store_n(out + i, h, n);
    });
  }
}

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

template <typename T>
void combine_typed(const CombineCpuParams& p, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(p.rows);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t* place = p.place + token * p.topk;
    const T* shared = static_cast<const T*>(p.shared) + token * p.dim;
    T* out = static_cast<T*>(p.out) + token * p.dim;
    cpu::for_lanes(p.dim, [&](int64_t i, int64_t n) {
      F16 sum = cpu::load_n(rows + place[0] * p.dim + i, n);
      for (int64_t k = 1; k < p.topk; ++k) sum = sum + cpu::load_n(rows + place[k] * p.dim + i, n);
      cpu::store_n(out + i, sum + cpu::load_n(shared + i, n), n);
    });
  }
}

void swiglu_rows(const SwigluCpuParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) {
    swiglu_typed<float>(p, begin, end);
  } else {
    swiglu_typed<uint16_t>(p, begin, end);
  }
}

void combine_tokens(const CombineCpuParams& p, int64_t begin, int64_t end) {
  if (p.dtype == ElementType::kF32) {
    combine_typed<float>(p, begin, end);
  } else {
    combine_typed<uint16_t>(p, begin, end);
  }
}

const bool filled_swiglu = swiglu_cpu.fill(cpu::kIsa, swiglu_rows) &&
                           swiglu_backward_cpu.fill(cpu::kIsa, swiglu_backward_rows);
const bool filled_combine = combine_cpu.fill(cpu::kIsa, combine_tokens);

}  // namespace
}  // namespace hadal::ops
