#include "ops/gemm/linear.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/quant/round_trip.h"

namespace hadal::ops {
namespace {

at::ScalarType result_type(const at::Tensor& x, GemmRole role) {
  return role == GemmRole::kFp32 ? compute_type(x) : x.scalar_type();
}

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
  return reference::linear(x, w, role);
}

at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role) {
  check_shape(x, {-1, -1}, "grouped_linear: x");
  check_shape(w, {-1, -1, x.size(1)}, "grouped_linear: w");
  check_shape(offsets, {w.size(0) + 1}, "grouped_linear: offsets");
  return reference::grouped_linear(x, w, offsets, role);
}

at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w) {
  check_shape(x, {-1, -1, -1}, "group_linear: x");
  check_shape(w, {x.size(1), -1, x.size(2)}, "group_linear: w");
  return reference::group_linear(x, w);
}

}  // namespace hadal::ops
