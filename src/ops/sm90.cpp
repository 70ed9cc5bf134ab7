#include "ops/sm90.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

thread_local bool differentiable = false;

bool serves(const at::Tensor& x, at::ScalarType type) {
  if (!x.is_cuda() || reference_forced() || differentiable || x.scalar_type() != type) return false;
  if (at::GradMode::is_enabled() && x.requires_grad()) return false;
  require_sm90(x.device());
  return true;
}

}  // namespace

DifferentiableGuard::DifferentiableGuard() : previous_(differentiable) { differentiable = true; }
DifferentiableGuard::~DifferentiableGuard() { differentiable = previous_; }

bool use_sm90(const at::Tensor& x) { return serves(x, at::kBFloat16); }
bool use_sm90_fp32(const at::Tensor& x) { return serves(x, at::kFloat); }

const uint16_t* bf16_data(const at::Tensor& x) {
  return reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>());
}
uint16_t* mutable_bf16_data(const at::Tensor& x) {
  return reinterpret_cast<uint16_t*>(x.mutable_data_ptr<at::BFloat16>());
}

at::Tensor fp32_input(const at::Tensor& x) { return kernel_input(x.to(at::kFloat)); }

}  // namespace hadal::ops
