// What every op shares: the four numerics, shape checks, dispatch to references, and the two
// autograd idioms.
//
// An op is one public function. On a device and dtype for which a kernel is filled it runs the
// kernel; otherwise its reference in plain ATen, which is the definition (numerics contract,
// docs/numerics.md).
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/kernel_types.h"

namespace hadal::ops {

/// ideal: FP32 (FP64 in tests) throughout, no round trips. bf16: BF16 weights and activations, no
/// round trips. released: what the official checkpoints were trained for, with FP8/FP4 activation
/// round trips. fp8: what Base checkpoints are trained in: bf16, but products of matrices and
/// experts in E4M3, and no FP4 anywhere (docs/decisions/0033-fp8.md).
enum class Numerics { kIdeal, kBf16, kReleased, kFp8 };

const char* numerics_name(Numerics numerics);
/// "ideal", "bf16", "released" or "fp8"; throws InputError for anything else.
Numerics parse_numerics(const std::string& name);

/// FP64 stays FP64, everything else computes in FP32.
at::ScalarType compute_type(const at::Tensor& x);
at::Tensor to_compute(const at::Tensor& x);

/// Throws Error printing both shapes unless x has this shape; -1 matches any size.
void check_shape(const at::Tensor& x, std::initializer_list<int64_t> shape, const char* what);

/// While one lives on this thread, every op runs its reference.
class ReferenceGuard {
 public:
  ReferenceGuard();
  ~ReferenceGuard();
  ReferenceGuard(const ReferenceGuard&) = delete;
  ReferenceGuard& operator=(const ReferenceGuard&) = delete;

 private:
  bool previous_;
};
bool reference_forced();

/// True when the CPU kernels serve these tensors: on the CPU, FP32 or BF16, no ReferenceGuard.
bool use_cpu_kernel(const at::Tensor& x);

/// True when the CUDA kernels may serve this tensor: on a GPU, FP32 or BF16, not empty, no
/// ReferenceGuard.
bool use_cuda_kernel(const at::Tensor& x);
/// x as the CUDA kernels read it: contiguous and aligned to 16 bytes; undefined stays undefined.
at::Tensor kernel_input(const at::Tensor& x);

/// The kernels' name of a tensor's type; FP32 or BF16.
ElementType element_type(const at::Tensor& x);

/// The stream that CUDA kernels on x's device are to use; null on the CPU.
Stream current_stream(const at::Tensor& x);

/// `value` in the forward pass; its gradient goes to `source` unchanged (straight-through
/// estimator).
at::Tensor straight_through(const at::Tensor& value, const at::Tensor& source);

using TensorFunction = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

/// Runs `kernel` forward; differentiates `reference` (recomputed in the backward pass) for the
/// gradients. Undefined inputs are passed through; outputs of integral type get no gradient.
std::vector<at::Tensor> with_reference_gradient(const TensorFunction& kernel,
                                                const TensorFunction& reference,
                                                const std::vector<at::Tensor>& inputs);

}  // namespace hadal::ops
