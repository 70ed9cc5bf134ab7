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

const bool filled = rms_norm_cpu.fill(cpu::kIsa, rms_norm_rows);

}  // namespace
}  // namespace hadal::ops
