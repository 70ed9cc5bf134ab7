// Clamped SwiGLU (model.md 11.2).
#pragma once

#include "base/fwd.h"

namespace hadal::ops {

/// h = weight * (g sigmoid(g) u) with g = min(gate, limit), u = clamp(up, -limit, limit); FP32
/// inside, one rounding. The gradient is zero where a clamp acts.
///   gate, up  [rows, inter]
///   weight    [rows] FP32 routing weights; undefined for the shared expert
at::Tensor swiglu(const at::Tensor& gate,
                  const at::Tensor& up,
                  const at::Tensor& weight,
                  double limit);

namespace reference {
at::Tensor swiglu(const at::Tensor& gate,
                  const at::Tensor& up,
                  const at::Tensor& weight,
                  double limit);
}  // namespace reference

}  // namespace hadal::ops
