#include "ops/attention/attention_backward_cpu.h"

#include "ops/cpu/isa.h"
#include "ops/cpu/vec.h"

namespace hadal::ops {
namespace {

namespace cpu = ops::cpu::HADAL_ISA;
using cpu::F16;

void logit_gradient(const LogitGradientRow& row, int64_t keys, float scale) {
  const F16 factor = cpu::splat(scale), lse = cpu::splat(row.lse), delta = cpu::splat(row.delta);
  cpu::for_lanes(keys, [&](int64_t i, int64_t n) {
    if (i >= row.last || i + n <= row.first) {
      cpu::store_n(row.dot + i, cpu::splat(0.0f), n);
      cpu::store_n(row.grad + i, cpu::splat(0.0f), n);
      return;
    }
    F16 p = cpu::exp(cpu::load_n(row.dot + i, n) * factor - lse);
    if (row.chosen != nullptr || i < row.first || i + n > row.last) {
      float lanes[16];
      cpu::to_array(lanes, p);
      for (int64_t lane = 0; lane < n; ++lane) {
        const int64_t key = i + lane;
        const bool visible =
            key >= row.first && key < row.last && (row.chosen == nullptr || row.chosen[key] != 0);
        if (!visible) lanes[lane] = 0.0f;
      }
      p = cpu::load(lanes);
    }
    cpu::store_n(row.grad + i, p * (cpu::load_n(row.grad + i, n) - delta) * factor, n);
    cpu::store_n(row.dot + i, p, n);
  });
}

void row_dots(const float* a, const float* b, int64_t rows, int64_t dim, float* out) {
  for (int64_t r = 0; r < rows; ++r) out[r] = cpu::dot(a + r * dim, b + r * dim, dim);
}

const bool filled =
    logit_gradient_cpu.fill(cpu::kIsa, logit_gradient) && row_dots_cpu.fill(cpu::kIsa, row_dots);

}  // namespace
}  // namespace hadal::ops
