#include "ops/norm/rms_norm.h"

#include <algorithm>

#include <ATen/ATen.h>

#include "base/parallel.h"
#include "ops/norm/rms_norm_cpu.h"

namespace hadal::ops {
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

namespace {

at::Tensor run_cpu(const at::Tensor& x, const at::Tensor& weight, double eps, bool bf16_chain) {
  const at::Tensor input = x.contiguous();
  const at::Tensor w = weight.defined() ? weight.to(at::kFloat).contiguous() : weight;
  at::Tensor out = at::empty_like(input);
  const RmsNormCpuParams params{.x = input.const_data_ptr(),
                                .weight = w.defined() ? w.const_data_ptr<float>() : nullptr,
                                .out = out.mutable_data_ptr(),
                                .dim = x.size(-1),
                                .eps = static_cast<float>(eps),
                                .dtype = element_type(x),
                                .bf16_chain = bf16_chain};
  parallel_for(input.numel() / params.dim, std::max<int64_t>(1, 16384 / params.dim),
               [&](int64_t begin, int64_t end) { rms_norm_cpu(params, begin, end); });
  return out;
}

}  // namespace

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_shape(weight, {x.size(-1)}, "rms_norm: weight");
  if (use_cpu_kernel(x)) {
    return with_reference_gradient(
        [eps](const auto& in) { return std::vector{run_cpu(in[0], in[1], eps, false)}; },
        [eps](const auto& in) { return std::vector{reference::rms_norm(in[0], in[1], eps)}; },
        {x, weight})[0];
  }
  return reference::rms_norm(x, weight, eps);
}

at::Tensor head_norm(const at::Tensor& x, double eps, Numerics numerics) {
  check_shape(x, {-1, -1, -1}, "head_norm: x");
  if (use_cpu_kernel(x)) {
    const bool chain = numerics == Numerics::kReleased && x.scalar_type() == at::kBFloat16;
    return with_reference_gradient(
        [eps, chain](const auto& in) {
          return std::vector{run_cpu(in[0], at::Tensor(), eps, chain)};
        },
        [eps, numerics](const auto& in) {
          return std::vector{reference::head_norm(in[0], eps, numerics)};
        },
        {x})[0];
  }
  return reference::head_norm(x, eps, numerics);
}

}  // namespace hadal::ops
