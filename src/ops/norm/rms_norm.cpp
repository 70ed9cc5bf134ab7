#include "ops/norm/rms_norm.h"

#include <algorithm>
#include <optional>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/math.h"
#include "base/parallel.h"
#include "ops/norm/rms_norm_backward_cpu.h"
#include "ops/norm/rms_norm_cpu.h"
#include "ops/norm/rms_norm_kernels.h"
#include "ops/norm/rms_norm_sm90.h"
#include "ops/sm90.h"
#include "ops/sum_tree.h"

namespace hadal::ops {

constinit KernelSlot<void(const RmsNormParams&, Stream)> rms_norm_cuda;
constinit KernelSlot<void(const RmsNormBackwardParams&, Stream)> rms_norm_backward_cuda;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const float* float_data(const at::Tensor& x) {
  return x.defined() ? x.const_data_ptr<float>() : nullptr;
}

bool use_kernel(const at::Tensor& x) {
  return use_cuda_kernel(x) && rms_norm_cuda && rms_norm_backward_cuda && x.size(-1) % 4 == 0;
}

/// The CUDA kernels; weight FP32 or absent (autograd's functions take no undefined tensor).
struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x_any,
                            const std::optional<at::Tensor>& weight_any,
                            double eps,
                            bool released) {
    const at::Tensor x = kernel_input(x_any),
                     weight = kernel_input(weight_any.value_or(at::Tensor()));
    const int64_t dim = x.size(-1), rows = x.numel() / dim;
    const at::Tensor out = at::empty_like(x);
    const at::Tensor rstd = at::empty({rows}, x.options().dtype(at::kFloat));
    rms_norm_cuda({.x = x.const_data_ptr(),
                   .weight = float_data(weight),
                   .out = out.data_ptr(),
                   .rstd = rstd.data_ptr<float>(),
                   .rows = rows,
                   .dim = dim,
                   .eps = static_cast<float>(eps),
                   .released = released,
                   .type = element_type(x)},
                  current_stream(x));
    context->save_for_backward({x, weight, rstd});
    return out;
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    const at::Tensor grad_out = kernel_input(grad_outputs[0]);
    const int64_t dim = x.size(-1), rows = x.numel() / dim;
    // The partition of the weight gradient depends on the number of rows only.
    const int64_t num_parts = std::clamp<int64_t>(rows / 64, 1, 512);
    const at::Tensor grad_x = at::empty_like(x);
    at::Tensor parts, grad_weight;
    if (weight.defined()) {
      parts = at::empty({num_parts, dim}, weight.options());
      grad_weight = at::empty_like(weight);
    }
    rms_norm_backward_cuda(
        {.x = x.const_data_ptr(),
         .weight = float_data(weight),
         .rstd = rstd.const_data_ptr<float>(),
         .grad_out = grad_out.const_data_ptr(),
         .grad_x = grad_x.data_ptr(),
         .parts = parts.defined() ? parts.data_ptr<float>() : nullptr,
         .grad_weight = grad_weight.defined() ? grad_weight.data_ptr<float>() : nullptr,
         .rows = rows,
         .dim = dim,
         .num_parts = num_parts,
         .type = element_type(x)},
        current_stream(x));
    return {grad_x, grad_weight, at::Tensor(), at::Tensor()};
  }
};

}  // namespace

namespace reference {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor xf = to_compute(x);
  const at::Tensor rstd = at::rsqrt(xf.square().mean(-1, /*keepdim=*/true) + eps);
  return (weight.to(xf.scalar_type()) * (xf * rstd)).to(x.scalar_type());
}

at::Tensor head_norm(const at::Tensor& x, double eps, Numerics numerics) {
  if (numerics == Numerics::kReleased) {
    const at::Tensor x2 = x.square();
    const at::Tensor mean = x2.to(at::kFloat).mean(-1, /*keepdim=*/true).to(x.scalar_type());
    return x * at::rsqrt(mean + eps);
  }
  const at::Tensor xf = to_compute(x);
  return (xf * at::rsqrt(xf.square().mean(-1, /*keepdim=*/true) + eps)).to(x.scalar_type());
}

}  // namespace reference

constinit CpuSlot<void(const RmsNormCpuParams&, int64_t, int64_t)> rms_norm_cpu;
constinit CpuSlot<void(const RmsNormBackwardCpuParams&, int64_t, int64_t)> rms_norm_backward_cpu;

namespace {

/// A weight as the kernel reads it. BF16, as checkpoints store it, is widened into memory of its
/// own: for one row a tensor operation would take longer than the norm.
class FloatWeight {
 public:
  explicit FloatWeight(const at::Tensor& weight) {
    if (!weight.defined()) return;
    if (weight.scalar_type() != at::kBFloat16) {
      tensor_ = weight.to(at::kFloat).contiguous();
      return;
    }
    tensor_ = weight.contiguous();
    const auto* values = tensor_.const_data_ptr<at::BFloat16>();
    widened_.assign(values, values + tensor_.numel());
  }
  const float* data() const { return widened_.empty() ? float_data(tensor_) : widened_.data(); }

 private:
  at::Tensor tensor_;
  std::vector<float> widened_;
};

at::Tensor run_cpu(const at::Tensor& x, const at::Tensor& weight, double eps, bool bf16_chain) {
  const at::Tensor input = x.contiguous();
  const FloatWeight w(weight);
  at::Tensor out = at::empty_like(input);
  const RmsNormCpuParams params{.x = input.const_data_ptr(),
                                .weight = w.data(),
                                .out = out.mutable_data_ptr(),
                                .dim = x.size(-1),
                                .eps = static_cast<float>(eps),
                                .dtype = element_type(x),
                                .bf16_chain = bf16_chain};
  parallel_for(input.numel() / params.dim, std::max<int64_t>(1, 16384 / params.dim),
               [&](int64_t begin, int64_t end) { rms_norm_cpu(params, begin, end); });
  return out;
}

/// The norm that learns nothing, with the bits of run_cpu.
at::Tensor norm_on_sm90(const at::Tensor& x_any,
                        const at::Tensor& weight_any,
                        double eps,
                        bool bf16_chain) {
  const at::Tensor x = kernel_input(x_any);
  const at::Tensor weight = weight_any.defined() ? fp32_input(weight_any) : weight_any;
  at::Tensor out = at::empty_like(x);
  run_sm90(x, rms_norm_sm90, rms_norm_twin,
           {.x = x.const_data_ptr(),
            .weight = float_data(weight),
            .out = out.mutable_data_ptr(),
            .rows = x.numel() / x.size(-1),
            .dim = x.size(-1),
            .eps = static_cast<float>(eps),
            .bf16_chain = bf16_chain});
  return out;
}

/// The CPU kernels; weight absent for head norms. `bf16_chain` differentiates as the FP32 norm: its
/// roundings pass gradients through.
struct RmsNormCpu : torch::autograd::Function<RmsNormCpu> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const std::optional<at::Tensor>& weight_any,
                            const std::optional<at::Tensor>& places,
                            double eps,
                            bool bf16_chain) {
    const at::Tensor weight = weight_any.value_or(at::Tensor());
    context->save_for_backward({x, weight, places.value_or(at::Tensor())});
    context->set_materialize_grads(false);
    context->saved_data["eps"] = eps;
    return run_cpu(x, weight, eps, bf16_chain);
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    variable_list grads(5);
    if (!grad_outputs[0].defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor x = saved[0].contiguous(), grad_out = grad_outputs[0].contiguous();
    const FloatWeight weight(saved[1]);
    const int64_t dim = x.size(-1);
    const std::vector<ChunkRun> runs = chunk_runs(
        x.numel() / dim, saved[2].defined() ? saved[2].const_data_ptr<int64_t>() : nullptr);
    const int64_t chunks = std::ssize(runs);
    grads[0] = at::empty_like(x);
    at::Tensor parts;  // [chunks, dim]
    if (saved[1].defined()) parts = at::empty({chunks, dim}, x.options().dtype(at::kFloat));
    parallel_for(chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        rms_norm_backward_cpu(
            {.x = x.const_data_ptr(),
             .grad_out = grad_out.const_data_ptr(),
             .weight = weight.data(),
             .grad_x = grads[0].mutable_data_ptr(),
             .grad_weight =
                 parts.defined() ? parts.mutable_data_ptr<float>() + chunk * dim : nullptr,
             .dim = dim,
             .eps = static_cast<float>(context->saved_data["eps"].toDouble()),
             .dtype = element_type(x)},
            runs[static_cast<size_t>(chunk)].begin, runs[static_cast<size_t>(chunk)].end);
      }
    });
    if (!parts.defined()) return grads;
    if (chunks == 0) {
      grads[1] = at::full({dim}, kNoSum, parts.options());
      return grads;
    }
    std::vector<at::Tensor> stack;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      at::Tensor sum = parts[chunk];
      for (int32_t merge = 0; merge < runs[static_cast<size_t>(chunk)].merges; ++merge) {
        sum = stack.back().add_(sum);
        stack.pop_back();
      }
      stack.push_back(sum);
    }
    grads[1] = stack.front();
    return grads;
  }
};

bool wants_gradient(const at::Tensor& x, const at::Tensor& weight) {
  return at::GradMode::is_enabled() &&
         (x.requires_grad() || (weight.defined() && weight.requires_grad()));
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x,
                    const at::Tensor& weight,
                    double eps,
                    const at::Tensor& places) {
  check_shape(weight, {x.size(-1)}, "rms_norm: weight");
  if (places.defined()) check_shape(places, {x.numel() / x.size(-1)}, "rms_norm: places");
  const bool learns = at::GradMode::is_enabled() && weight.requires_grad();
  if (serves_rms_norm_sm90(x.size(-1)) && use_sm90(x) && !learns)
    return norm_on_sm90(x, weight, eps, false);
  refuse_as_hopper(x, "rms_norm");
  if (use_kernel(x)) return RmsNorm::apply(x, std::optional(weight.to(at::kFloat)), eps, false);
  if (use_cpu_kernel(x)) {
    if (wants_gradient(x, weight)) {
      const auto rows = places.defined() ? std::optional(places.contiguous()) : std::nullopt;
      return RmsNormCpu::apply(x, std::optional(weight), rows, eps, false);
    }
    return run_cpu(x, weight, eps, false);
  }
  return reference::rms_norm(x, weight, eps);
}

at::Tensor head_norm(const at::Tensor& x, double eps, Numerics numerics) {
  check_shape(x, {-1, -1, -1}, "head_norm: x");
  if (serves_rms_norm_sm90(x.size(-1)) && use_sm90(x))
    return norm_on_sm90(x, at::Tensor(), eps, numerics == Numerics::kReleased);
  refuse_as_hopper(x, "head_norm");
  // The gradient of the released chain is that of the FP32 norm: its roundings pass it through.
  if (use_kernel(x)) {
    return RmsNorm::apply(x, std::optional<at::Tensor>(), eps, numerics == Numerics::kReleased);
  }
  if (use_cpu_kernel(x)) {
    const bool chain = numerics == Numerics::kReleased && x.scalar_type() == at::kBFloat16;
    if (wants_gradient(x, {})) {
      const std::optional<at::Tensor> none;
      return RmsNormCpu::apply(x, none, none, eps, chain);
    }
    return run_cpu(x, at::Tensor(), eps, chain);
  }
  return reference::head_norm(x, eps, numerics);
}

}  // namespace hadal::ops
