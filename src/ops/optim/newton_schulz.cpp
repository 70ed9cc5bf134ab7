#include "ops/optim/newton_schulz.h"

#include <vector>

#include <ATen/ATen.h>

#include "base/parallel.h"
#include "ops/gemm/linear_cpu.h"
#include "ops/op.h"
#include "ops/optim/newton_schulz_cpu.h"

namespace hadal::ops {

constinit CpuSlot<void(const NewtonSchulzCpuParams&, int64_t, int64_t)> newton_schulz_cpu;

namespace {

at::Tensor orthogonalise(const at::Tensor& u, bool low_precision) {
  const bool tall = u.size(1) > u.size(2);
  at::Tensor x = tall ? u.transpose(1, 2) : u;
  // The smallest normal number keeps 0 / 0 away; no gradient of interest is near it.
  const at::Tensor norm = x.square().sum({1, 2}, /*keepdim=*/true).sqrt().clamp_min(1e-37);
  x = (x / norm).contiguous();
  if (low_precision) x = x.to(at::kBFloat16);
  for (int step = 0; step < kSchulzSteps; ++step) {
    const SchulzCoefficients& k = schulz_coefficients(step);
    const at::Tensor gram = at::bmm(x, x.transpose(1, 2));
    // b G + c G^2, then a X + (...) X, each as one fused product.
    const at::Tensor polynomial = at::baddbmm(gram, gram, gram, k.b, k.c);
    x = at::baddbmm(x, polynomial, x, k.a, 1.0);
  }
  x = x.to(u.scalar_type());
  return tall ? x.transpose(1, 2).contiguous() : x;
}

/// u [units, rows, cols] FP32; every unit is one thread's.
at::Tensor orthogonalise_on_cpu(const at::Tensor& u_any, bool low_precision) {
  const at::Tensor u = u_any.contiguous(), result = at::empty_like(u);
  RowForm form;
  gemm_row_form_cpu(kBlockWidth, WeightFormat::kBf16, &form);
  const NewtonSchulzCpuParams params{.u = u.const_data_ptr<float>(),
                                     .out = result.mutable_data_ptr<float>(),
                                     .rows = u.size(1),
                                     .cols = u.size(2),
                                     .bf16 = low_precision,
                                     .bf16_rows = form.bf16};
  parallel_for(u.size(0), 1,
               [&](int64_t begin, int64_t end) { newton_schulz_cpu(params, begin, end); });
  return result;
}

}  // namespace

at::Tensor newton_schulz(const at::Tensor& u, bool low_precision) {
  check_shape(u, {-1, -1, -1}, "newton_schulz: u");
  if (use_cpu_kernel(u) && u.scalar_type() == at::kFloat && u.numel() > 0)
    return orthogonalise_on_cpu(u, low_precision);
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
