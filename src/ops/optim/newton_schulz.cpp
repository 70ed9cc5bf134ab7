#include "ops/optim/newton_schulz.h"

#include <vector>

#include <ATen/ATen.h>

#include "ops/op.h"

namespace hadal::ops {
namespace {

struct Coefficients {
  double a, b, c;
};
constexpr Coefficients kRough{3.4445, -4.7750, 2.0315};
constexpr Coefficients kFine{2.0, -1.5, 0.5};

at::Tensor orthogonalise(const at::Tensor& u, bool low_precision) {
  const bool tall = u.size(1) > u.size(2);
  at::Tensor x = tall ? u.transpose(1, 2) : u;
  // The smallest normal number keeps 0 / 0 away; no gradient of interest is near it.
  const at::Tensor norm = x.square().sum({1, 2}, /*keepdim=*/true).sqrt().clamp_min(1e-37);
  x = (x / norm).contiguous();
  if (low_precision) x = x.to(at::kBFloat16);
  for (int step = 0; step < 10; ++step) {
    const Coefficients& k = step < 8 ? kRough : kFine;
    const at::Tensor gram = at::bmm(x, x.transpose(1, 2));
    // b G + c G^2, then a X + (...) X, each as one fused product.
    const at::Tensor polynomial = at::baddbmm(gram, gram, gram, k.b, k.c);
    x = at::baddbmm(x, polynomial, x, k.a, 1.0);
  }
  x = x.to(u.scalar_type());
  return tall ? x.transpose(1, 2).contiguous() : x;
}

}  // namespace

at::Tensor newton_schulz(const at::Tensor& u, bool low_precision) {
  check_shape(u, {-1, -1, -1}, "newton_schulz: u");
  if (!u.is_cpu() || u.size(0) <= 1) return orthogonalise(u, low_precision);
  // The CPU library's batched product chooses its order of summation by the number of matrices; the
  // contract is the bits of each matrix alone.
  std::vector<at::Tensor> each;
  for (int64_t i = 0; i < u.size(0); ++i) {
    each.push_back(orthogonalise(u.narrow(0, i, 1), low_precision));
  }
  return at::cat(each);
}

}  // namespace hadal::ops
