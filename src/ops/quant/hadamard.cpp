#include "ops/quant/hadamard.h"

#include <cmath>

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/op.h"

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

at::Tensor hadamard(const at::Tensor& x) {
  const int64_t dim = x.size(-1);
  HADAL_CHECK(dim > 0 && (dim & (dim - 1)) == 0, "hadamard: dim ", dim, " is no power of two");
  return reference::hadamard(x);
}

}  // namespace hadal::ops
