#include "ops/moe/swiglu.h"

#include <ATen/ATen.h>

#include "base/parallel.h"
#include "ops/moe/moe_cpu.h"
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

constinit CpuSlot<void(const SwigluCpuParams&, int64_t, int64_t)> swiglu_cpu;

namespace {

at::Tensor run_cpu(const at::Tensor& gate,
                   const at::Tensor& up,
                   const at::Tensor& weight,
                   double limit) {
  const at::Tensor g = gate.contiguous(), u = up.contiguous();
  const at::Tensor w = weight.defined() ? weight.to(at::kFloat).contiguous() : weight;
  at::Tensor out = at::empty_like(g);
  const SwigluCpuParams params{.gate = g.const_data_ptr(),
                               .up = u.const_data_ptr(),
                               .weight = w.defined() ? w.const_data_ptr<float>() : nullptr,
                               .out = out.mutable_data_ptr(),
                               .inter = g.size(1),
                               .limit = static_cast<float>(limit),
                               .dtype = element_type(g)};
  parallel_for(g.size(0), 4, [&](int64_t begin, int64_t end) { swiglu_cpu(params, begin, end); });
  return out;
}

}  // namespace

at::Tensor swiglu(const at::Tensor& gate,
                  const at::Tensor& up,
                  const at::Tensor& weight,
                  double limit) {
  check_shape(up, {gate.size(0), gate.size(1)}, "swiglu: up");
  if (weight.defined()) check_shape(weight, {gate.size(0)}, "swiglu: weight");
  if (use_cpu_kernel(gate)) {
    return with_reference_gradient(
        [limit](const auto& in) { return std::vector{run_cpu(in[0], in[1], in[2], limit)}; },
        [limit](const auto& in) {
          return std::vector{reference::swiglu(in[0], in[1], in[2], limit)};
        },
        {gate, up, weight})[0];
  }
  return reference::swiglu(gate, up, weight, limit);
}

}  // namespace hadal::ops
