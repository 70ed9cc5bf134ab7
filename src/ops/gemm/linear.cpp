#include "ops/gemm/linear.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "ops/quant/round_trip.h"

namespace hadal::ops {
namespace {

at::ScalarType result_type(const at::Tensor& x, GemmRole role) {
  return role == GemmRole::kFp32 ? compute_type(x) : x.scalar_type();
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Until hadal's own GEMM kernels exist, BF16 training on CUDA uses the library's: BF16 operands,
/// FP32 accumulation.
bool use_library_gemm(const at::Tensor& x, const at::Tensor& w) {
  return x.is_cuda() && !reference_forced() && x.scalar_type() == at::kBFloat16 &&
         w.scalar_type() == at::kBFloat16;
}

/// lin32: BF16 operands, FP32 result (no rounding of the products' sum).
struct LinearFp32 : torch::autograd::Function<LinearFp32> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& w) {
    context->save_for_backward({x, w});
    return at::mm(x, w.t(), at::kFloat);
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor grad = grad_outputs[0].to(at::kBFloat16);
    at::Tensor grad_x, grad_w;
    if (context->needs_input_grad(0)) grad_x = at::mm(grad, saved[1]);
    if (context->needs_input_grad(1)) grad_w = at::mm(grad.t(), saved[0]);
    return {grad_x, grad_w};
  }
};

}  // namespace

bool quantises_input(GemmRole role, Numerics numerics) {
  return numerics == Numerics::kReleased && (role == GemmRole::kFp8 || role == GemmRole::kFp4);
}

int64_t slab_length(GemmRole role) { return role == GemmRole::kFp4 ? 32 : 128; }

at::Tensor quantise_input(const at::Tensor& x, GemmRole role, Numerics numerics) {
  return quantises_input(role, numerics) ? fp8_round_trip(x, 128) : x;
}

namespace reference {

at::Tensor linear(const at::Tensor& x, const at::Tensor& w, GemmRole role) {
  const at::ScalarType type = compute_type(x);
  return at::linear(x.to(type), w.to(type)).to(result_type(x, role));
}

at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role) {
  const at::Tensor bounds = offsets.to(at::kCPU);
  std::vector<at::Tensor> parts;
  for (int64_t expert = 0; expert < w.size(0); ++expert) {
    const int64_t begin = bounds[expert].item<int64_t>(), end = bounds[expert + 1].item<int64_t>();
    parts.push_back(reference::linear(x.narrow(0, begin, end - begin), w[expert], role));
  }
  return at::cat(parts);
}

at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w) {
  const at::ScalarType type = compute_type(x);
  return at::einsum("tgi,goi->tgo", {x.to(type), w.to(type)}).to(x.scalar_type());
}

}  // namespace reference

at::Tensor linear(const at::Tensor& x, const at::Tensor& w, GemmRole role) {
  check_shape(x, {-1, -1}, "linear: x");
  check_shape(w, {-1, x.size(1)}, "linear: w");
  if (use_library_gemm(x, w)) {
    return role == GemmRole::kFp32 ? LinearFp32::apply(x, w) : at::linear(x, w);
  }
  return reference::linear(x, w, role);
}

at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role) {
  check_shape(x, {-1, -1}, "grouped_linear: x");
  check_shape(w, {-1, -1, x.size(1)}, "grouped_linear: w");
  check_shape(offsets, {w.size(0) + 1}, "grouped_linear: offsets");
  if (use_library_gemm(x, w) && role != GemmRole::kFp32) {
    const at::Tensor ends = offsets.narrow(0, 1, w.size(0)).to(at::kInt);
    return at::_grouped_mm(x, w.transpose(1, 2), ends);
  }
  return reference::grouped_linear(x, w, offsets, role);
}

at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w) {
  check_shape(x, {-1, -1, -1}, "group_linear: x");
  check_shape(w, {x.size(1), -1, x.size(2)}, "group_linear: w");
  if (use_library_gemm(x, w)) {
    return at::bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1);
  }
  return reference::group_linear(x, w);
}

}  // namespace hadal::ops
