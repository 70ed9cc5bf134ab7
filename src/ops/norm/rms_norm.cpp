#include "ops/norm/rms_norm.h"

#include <ATen/ATen.h>

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

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_shape(weight, {x.size(-1)}, "rms_norm: weight");
  return reference::rms_norm(x, weight, eps);
}

at::Tensor head_norm(const at::Tensor& x, double eps, Numerics numerics) {
  check_shape(x, {-1, -1, -1}, "head_norm: x");
  return reference::head_norm(x, eps, numerics);
}

}  // namespace hadal::ops
