#include "ops/moe/swiglu.h"

#include <optional>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/parallel.h"
#include "ops/moe/moe_cpu.h"
#include "ops/moe/moe_sm90.h"
#include "ops/moe/swiglu_backward_cpu.h"
#include "ops/moe/swiglu_kernels.h"
#include "ops/op.h"
#include "ops/sm90.h"

namespace hadal::ops {

constinit KernelSlot<void(const SwigluParams&, Stream)> swiglu_cuda;
constinit KernelSlot<void(const SwigluBackwardParams&, Stream)> swiglu_backward_cuda;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const float* float_data(const at::Tensor& x) {
  return x.defined() ? x.const_data_ptr<float>() : nullptr;
}

/// The CUDA kernels; weight FP32 or absent (autograd's functions take no undefined tensor).
struct Swiglu : torch::autograd::Function<Swiglu> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& gate_any,
                            const at::Tensor& up_any,
                            const std::optional<at::Tensor>& weight_any,
                            double limit) {
    const at::Tensor gate = kernel_input(gate_any), up = kernel_input(up_any);
    const at::Tensor weight = kernel_input(weight_any.value_or(at::Tensor()));
    const at::Tensor out = at::empty_like(gate);
    swiglu_cuda({.gate = gate.const_data_ptr(),
                 .up = up.const_data_ptr(),
                 .weight = float_data(weight),
                 .out = out.data_ptr(),
                 .rows = gate.size(0),
                 .inter = gate.size(1),
                 .limit = static_cast<float>(limit),
                 .type = element_type(gate)},
                current_stream(gate));
    context->save_for_backward({gate, up, weight});
    context->saved_data["limit"] = limit;
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &gate = saved[0], &up = saved[1], &weight = saved[2];
    const at::Tensor grad_out = kernel_input(grad_outputs[0]);
    const at::Tensor grad_gate = at::empty_like(gate), grad_up = at::empty_like(up);
    const at::Tensor grad_weight = weight.defined() ? at::empty_like(weight) : at::Tensor();
    swiglu_backward_cuda(
        {.gate = gate.const_data_ptr(),
         .up = up.const_data_ptr(),
         .weight = float_data(weight),
         .grad_out = grad_out.const_data_ptr(),
         .grad_gate = grad_gate.data_ptr(),
         .grad_up = grad_up.data_ptr(),
         .grad_weight = grad_weight.defined() ? grad_weight.data_ptr<float>() : nullptr,
         .rows = gate.size(0),
         .inter = gate.size(1),
         .limit = static_cast<float>(context->saved_data["limit"].toDouble()),
         .type = element_type(gate)},
        current_stream(gate));
    return {grad_gate, grad_up, grad_weight, at::Tensor()};
  }
};

}  // namespace

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
constinit CpuSlot<void(const SwigluBackwardCpuParams&, int64_t, int64_t)> swiglu_backward_cpu;

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

at::Tensor swiglu_on_sm90(const at::Tensor& gate_any,
                          const at::Tensor& up_any,
                          const at::Tensor& weight_any,
                          double limit) {
  const at::Tensor gate = kernel_input(gate_any), up = kernel_input(up_any);
  const at::Tensor weight = weight_any.defined() ? fp32_input(weight_any) : weight_any;
  at::Tensor out = at::empty_like(gate);
  run_sm90(gate, swiglu_sm90, swiglu_twin,
           {.gate = gate.const_data_ptr(),
            .up = up.const_data_ptr(),
            .weight = float_data(weight),
            .out = out.mutable_data_ptr(),
            .rows = gate.size(0),
            .inter = gate.size(1),
            .limit = static_cast<float>(limit)});
  return out;
}

/// The CPU kernels.
struct SwigluCpu : torch::autograd::Function<SwigluCpu> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& gate,
                            const at::Tensor& up,
                            const std::optional<at::Tensor>& weight,
                            double limit) {
    const at::Tensor w = weight.value_or(at::Tensor());
    context->save_for_backward({gate, up, w});
    context->set_materialize_grads(false);
    context->saved_data["limit"] = limit;
    return run_cpu(gate, up, w, limit);
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    variable_list grads(4);
    if (!grad_outputs[0].defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor gate = saved[0].contiguous(), up = saved[1].contiguous(),
                     grad_out = grad_outputs[0].contiguous();
    const at::Tensor weight =
        saved[2].defined() ? saved[2].to(at::kFloat).contiguous() : at::Tensor();
    grads[0] = at::empty_like(gate);
    grads[1] = at::empty_like(up);
    if (weight.defined()) grads[2] = at::empty_like(weight);
    const SwigluBackwardCpuParams params{
        .gate = gate.const_data_ptr(),
        .up = up.const_data_ptr(),
        .grad_out = grad_out.const_data_ptr(),
        .weight = float_data(weight),
        .grad_gate = grads[0].mutable_data_ptr(),
        .grad_up = grads[1].mutable_data_ptr(),
        .grad_weight = weight.defined() ? grads[2].mutable_data_ptr<float>() : nullptr,
        .inter = gate.size(1),
        .limit = static_cast<float>(context->saved_data["limit"].toDouble()),
        .dtype = element_type(gate)};
    parallel_for(gate.size(0), 4,
                 [&](int64_t begin, int64_t end) { swiglu_backward_cpu(params, begin, end); });
    return grads;
  }
};

}  // namespace

at::Tensor swiglu(const at::Tensor& gate,
                  const at::Tensor& up,
                  const at::Tensor& weight,
                  double limit) {
  check_shape(up, {gate.size(0), gate.size(1)}, "swiglu: up");
  if (weight.defined()) check_shape(weight, {gate.size(0)}, "swiglu: weight");
  const bool learns = weight.defined() && at::GradMode::is_enabled() && weight.requires_grad();
  if (serves_moe_rows_sm90(gate.size(1)) && use_sm90(gate) && use_sm90(up) && !learns)
    return swiglu_on_sm90(gate, up, weight, limit);
  refuse_as_hopper(gate, "swiglu");
  if (use_cuda_kernel(gate) && swiglu_cuda && swiglu_backward_cuda && gate.size(1) % 4 == 0 &&
      up.scalar_type() == gate.scalar_type()) {
    std::optional<at::Tensor> w;
    if (weight.defined()) w = weight.to(at::kFloat);
    return Swiglu::apply(gate, up, w, limit);
  }
  if (use_cpu_kernel(gate)) {
    const bool trains =
        at::GradMode::is_enabled() && (gate.requires_grad() || up.requires_grad() ||
                                       (weight.defined() && weight.requires_grad()));
    if (!trains) return run_cpu(gate, up, weight, limit);
    return SwigluCpu::apply(gate, up, weight.defined() ? std::optional(weight) : std::nullopt,
                            limit);
  }
  return reference::swiglu(gate, up, weight, limit);
}

}  // namespace hadal::ops
