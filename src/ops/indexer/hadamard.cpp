#include "ops/indexer/hadamard.h"

#include <cmath>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/op.h"
#include "ops/quant/round_trip_cpu.h"

namespace hadal::ops {
namespace reference {

at::Tensor hadamard(const at::Tensor& x) {
  const int64_t dim = x.size(-1);
  at::Tensor y = to_compute(x).reshape({-1, dim});
  for (int64_t stride = 1; stride < dim; stride *= 2) {
    const at::Tensor pairs = y.reshape({-1, dim / (2 * stride), 2, stride});
    const at::Tensor a = pairs.select(2, 0), b = pairs.select(2, 1);
    y = at::stack({a + b, a - b}, 2).reshape({-1, dim});
  }
  // The factor is rounded to FP32 first, as the official kernel's scale argument is.
  const double factor =
      y.scalar_type() == at::kDouble
          ? 1.0 / std::sqrt(static_cast<double>(dim))
          : static_cast<double>(static_cast<float>(1.0 / std::sqrt(static_cast<double>(dim))));
  return (y * factor).reshape(x.sizes()).to(x.scalar_type());
}

}  // namespace reference

constinit CpuSlot<void(const HadamardCpuParams&, int64_t, int64_t)> hadamard_cpu;

namespace {

at::Tensor run_cpu(const at::Tensor& x) {
  const at::Tensor input = x.contiguous();
  at::Tensor out = at::empty_like(input);
  const HadamardCpuParams params{.x = input.const_data_ptr(),
                                 .out = out.mutable_data_ptr(),
                                 .dim = x.size(-1),
                                 .dtype = element_type(x)};
  parallel_for(input.numel() / params.dim, 16,
               [&](int64_t begin, int64_t end) { hadamard_cpu(params, begin, end); });
  return out;
}

/// The rotation is symmetric: its gradient is itself.
struct HadamardCpu : torch::autograd::Function<HadamardCpu> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x) {
    context->set_materialize_grads(false);
    return run_cpu(x);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 torch::autograd::variable_list grad_outputs) {
    if (!grad_outputs[0].defined()) return {at::Tensor()};
    return {run_cpu(grad_outputs[0])};
  }
};

}  // namespace

at::Tensor hadamard(const at::Tensor& x) {
  const int64_t dim = x.size(-1);
  HADAL_CHECK(dim > 0 && (dim & (dim - 1)) == 0, "hadamard: dim ", dim, " is no power of two");
  if (use_cpu_kernel(x) && dim <= 1024) {
    const bool trains = at::GradMode::is_enabled() && x.requires_grad();
    return trains ? HadamardCpu::apply(x) : run_cpu(x);
  }
  return reference::hadamard(x);
}

}  // namespace hadal::ops
