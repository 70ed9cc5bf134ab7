// When ops call the Hopper kernels (*_sm90.h), and what they hand to them.
//
// BF16 tensors are those of `released` and `bf16`; `ideal` computes in FP32 and runs references.
#pragma once

#include <ATen/core/Tensor.h>

#include "ops/kernel_types.h"

namespace hadal::ops {

/// While one lives, this thread's ops take the kernels that have gradients, whether or not any is
/// recorded: for a forward pass that is computed a second time for its gradients.
class DifferentiableGuard {
 public:
  DifferentiableGuard();
  ~DifferentiableGuard();
  DifferentiableGuard(const DifferentiableGuard&) = delete;
  DifferentiableGuard& operator=(const DifferentiableGuard&) = delete;

 private:
  bool previous_;
};

/// Whether the Hopper kernels serve x: BF16 on a GPU, no gradient of it asked for, no guard. Error
/// for a GPU of another generation, by its name.
bool use_sm90(const at::Tensor& x);
/// The same for FP32 tensors that a product of BF16 ones gave.
bool use_sm90_fp32(const at::Tensor& x);

/// Error unless the device is a GPU of compute capability 9.0, naming what it is.
void require_sm90(at::Device device);

/// Elements of a BF16 tensor as the kernels take them.
const uint16_t* bf16_data(const at::Tensor& x);
uint16_t* mutable_bf16_data(const at::Tensor& x);
/// x in FP32, contiguous and aligned to 16 bytes, as weights of norms and tables are read.
at::Tensor fp32_input(const at::Tensor& x);

}  // namespace hadal::ops
