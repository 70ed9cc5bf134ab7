// The numerics contract of CPU kernels as checks: the same bits for every instruction set, number
// of threads and company of other rows, and close to the reference in float64.
#pragma once

#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hadal::testing {

/// While one lives, ATen computes on one thread: for thousands of tiny evaluations, where waking
/// its threads takes longer than the work.
class OneAtenThread {
 public:
  OneAtenThread();
  ~OneAtenThread();
  OneAtenThread(const OneAtenThread&) = delete;
  OneAtenThread& operator=(const OneAtenThread&) = delete;

 private:
  int before_;
};

/// Bitwise equality (NaN equals NaN, -0 differs from 0).
bool same_bits(const at::Tensor& a, const at::Tensor& b);

using KernelCall = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

/// Runs call(inputs) under every instruction set the processor has, each with 1, 2 and 5 threads,
/// and expects the same bits; restores both. Returns the outputs.
std::vector<at::Tensor> expect_machine_independent(const KernelCall& call,
                                                   const std::vector<at::Tensor>& inputs);

/// Expects every row of call(inputs) to be the bits of call() on that row alone, and of call() on
/// the second half of the rows. The first `row_inputs` inputs are cut along dimension 0, the others
/// are passed whole.
void expect_row_independent(const KernelCall& call,
                            const std::vector<at::Tensor>& inputs,
                            size_t row_inputs);

/// Both of the above, and outputs within `tolerance` (relative to the largest magnitude of each
/// output) of the reference in float64. The inputs are FP32 or BF16.
void check_kernel(const char* name,
                  const KernelCall& call,
                  const std::vector<at::Tensor>& inputs,
                  size_t row_inputs,
                  double tolerance);

}  // namespace hadal::testing
