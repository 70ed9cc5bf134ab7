#include "ops/sm90.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

thread_local bool differentiable = false, stands_for_hopper = false;

/// Whether x is where Hopper kernels may serve it.
bool on_hopper(const at::Tensor& x) { return x.is_cuda() || (stands_for_hopper && x.is_cpu()); }

bool serves(const at::Tensor& x, at::ScalarType type) {
  if (!on_hopper(x) || reference_forced() || differentiable || x.scalar_type() != type)
    return false;
  if (at::GradMode::is_enabled() && x.requires_grad()) return false;
  if (x.is_cuda()) require_sm90(x.device());
  return true;
}

}  // namespace

DifferentiableGuard::DifferentiableGuard() : previous_(differentiable) { differentiable = true; }
DifferentiableGuard::~DifferentiableGuard() { differentiable = previous_; }

AsHopperGuard::AsHopperGuard() : previous_(stands_for_hopper) { stands_for_hopper = true; }
AsHopperGuard::~AsHopperGuard() { stands_for_hopper = previous_; }
bool as_hopper() { return stands_for_hopper; }

void refuse_as_hopper(const at::Tensor& x, std::string_view what) {
  if (!stands_for_hopper || !x.is_cpu()) return;
  throw InputError(concat("as hopper: ", what,
                          ": no Hopper kernel does this, and a card leaves it to code whose bits a "
                          "CPU cannot say (docs/kernels.md)"));
}

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
