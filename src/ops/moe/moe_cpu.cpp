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

const bool filled_swiglu = swiglu_cpu.fill(cpu::kIsa, swiglu_rows);
const bool filled_combine = combine_cpu.fill(cpu::kIsa, combine_tokens);

}  // namespace
}  // namespace hadal::ops
