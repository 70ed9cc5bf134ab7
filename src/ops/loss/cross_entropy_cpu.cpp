#include "ops/loss/cross_entropy_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

constexpr float kMinusInfinity = -__builtin_inff();

/// The last vector's empty lanes become `fill`.
F16 load_filled(const float* p, int64_t n, float fill) {
  if (n == 16) return cpu::load(p);
  float lanes[16];
  for (int64_t i = 0; i < 16; ++i) lanes[i] = i < n ? p[i] : fill;
  return cpu::load(lanes);
}

template <typename T>
void row(const CrossEntropyCpuParams& p, int64_t index) {
  const float* logits = p.logits + index * p.vocab;
  T* grad = p.grad == nullptr ? nullptr : static_cast<T*>(p.grad) + index * p.vocab;
  const int64_t target = p.targets[index];
  if (target < 0) {
    p.loss[index] = 0.0f;
    if (grad == nullptr) return;
    cpu::for_lanes(p.vocab,
                   [&](int64_t i, int64_t n) { cpu::store_n(grad + i, cpu::splat(0.0f), n); });
    return;
  }
  F16 highest = cpu::splat(kMinusInfinity);
  cpu::for_lanes(p.vocab, [&](int64_t i, int64_t n) {
    highest = cpu::max(load_filled(logits + i, n, kMinusInfinity), highest);
  });
  const F16 max = cpu::splat(cpu::max_lane(highest));
  F16 total = cpu::splat(0.0f);
  cpu::for_lanes(p.vocab, [&](int64_t i, int64_t n) {
    total = total + cpu::exp(load_filled(logits + i, n, kMinusInfinity) - max);
  });
  const double log_total = __builtin_log(static_cast<double>(cpu::sum(total)));
  float lanes[16];
  cpu::to_array(lanes, max);
  p.loss[index] = static_cast<float>(log_total + static_cast<double>(lanes[0]) -
                                     static_cast<double>(logits[target]));
  if (grad == nullptr) return;
  const F16 inverse = cpu::splat(1.0f / cpu::sum(total));
  cpu::for_lanes(p.vocab, [&](int64_t i, int64_t n) {
    F16 share = cpu::exp(cpu::load_n(logits + i, n) - max) * inverse;
    if (target >= i && target < i + n) {
      cpu::to_array(lanes, share);
      lanes[target - i] -= 1.0f;
      share = cpu::load(lanes);
    }
    cpu::store_n(grad + i, share, n);
  });
}

void rows(const CrossEntropyCpuParams& p, int64_t begin, int64_t end) {
  for (int64_t index = begin; index < end; ++index) {
    if (p.grad_type == ElementType::kF32) {
      row<float>(p, index);
    } else {
      row<uint16_t>(p, index);
    }
  }
}

const bool filled = cross_entropy_cpu.fill(cpu::kIsa, rows);

}  // namespace
}  // namespace hadal::ops
