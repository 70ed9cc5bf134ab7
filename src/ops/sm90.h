// When ops call the Hopper kernels (*_sm90.h), and what they hand to them.
//
// BF16 tensors are those of `released` and `bf16`; `ideal` computes in FP32 and runs references.
#pragma once

#include <string_view>
#include <type_traits>

#include <ATen/core/Tensor.h>

#include "ops/kernel_types.h"
#include "ops/op.h"

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

/// While one lives, this thread's tensors on the CPU stand for those on a Hopper card: ops decide
/// as they do there, and kernels are their twins, whose bits are the card's
/// (docs/decisions/0022-as-hopper.md). What a card would leave to a library or a reference is
/// refused (refuse_as_hopper). For `released` and `bf16`.
class AsHopperGuard {
 public:
  AsHopperGuard();
  ~AsHopperGuard();
  AsHopperGuard(const AsHopperGuard&) = delete;
  AsHopperGuard& operator=(const AsHopperGuard&) = delete;

 private:
  bool previous_;
};
bool as_hopper();

/// Whether the Hopper kernels serve x: BF16 on a GPU, or on the CPU under an AsHopperGuard, no
/// gradient of it asked for, no guard that forbids it. Error for a GPU of another generation, by
/// its name.
bool use_sm90(const at::Tensor& x);
/// The same for FP32 tensors that a product of BF16 ones gave.
bool use_sm90_fp32(const at::Tensor& x);

/// Where an op goes on without a Hopper kernel: InputError, naming the op and what it has no kernel
/// for, when x stands for a tensor on a card, because nobody can say the bits of what follows
/// there.
void refuse_as_hopper(const at::Tensor& x, std::string_view what);

/// A kernel where its tensors lie: kernel(p, stream) on a GPU, twin(p) on the CPU.
template <typename Params, typename Kernel>
void run_sm90(const at::Tensor& on,
              Kernel&& kernel,
              void (*twin)(const Params&),
              const std::type_identity_t<Params>& p) {
  if (on.is_cpu()) return twin(p);
  kernel(p, current_stream(on));
}

/// Error unless the device is a GPU of compute capability 9.0, naming what it is.
void require_sm90(at::Device device);

/// Elements of a BF16 tensor as the kernels take them.
const uint16_t* bf16_data(const at::Tensor& x);
uint16_t* mutable_bf16_data(const at::Tensor& x);
/// x in FP32, contiguous and aligned to 16 bytes, as weights of norms and tables are read.
at::Tensor fp32_input(const at::Tensor& x);

}  // namespace hadal::ops
