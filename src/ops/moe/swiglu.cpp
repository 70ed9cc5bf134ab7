#include "ops/moe/swiglu.h"

#include <ATen/ATen.h>

#include "ops/op.h"

namespace hadal::ops {
namespace reference {

at::Tensor swiglu(const at::Tensor& gate,
                  const at::Tensor& up,
                  const at::Tensor& weight,
                  double limit) {
  const at::Tensor g = to_compute(gate).clamp_max(limit);
  const at::Tensor u = to_compute(up).clamp(-limit, limit);
  at::Tensor h = g * at::sigmoid(g) * u;
  if (weight.defined()) h = weight.to(h.scalar_type()).unsqueeze(1) * h;
  return h.to(gate.scalar_type());
}

}  // namespace reference

at::Tensor swiglu(const at::Tensor& gate,
                  const at::Tensor& up,
                  const at::Tensor& weight,
                  double limit) {
  check_shape(up, {gate.size(0), gate.size(1)}, "swiglu: up");
  if (weight.defined()) check_shape(weight, {gate.size(0)}, "swiglu: weight");
  return reference::swiglu(gate, up, weight, limit);
}

}  // namespace hadal::ops
