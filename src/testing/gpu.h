// Helpers of tests and benches that run on the GPU machine.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hadal::testing {

/// Waits for everything on the current CUDA device.
void synchronize();

/// Median microseconds of `body` over `repeats` runs after three warm-up runs, host clock around
/// synchronised work.
double median_us(const std::function<void()>& body, int repeats = 20);

/// |a - b| / |b| as Frobenius norms in FP64; NaN when either holds one.
double relative_error(const at::Tensor& a, const at::Tensor& b);

/// One line of tools/gpu_check.sh's table: name, relative error, microseconds, GB/s, share of the
/// card's copy rate.
void report(const std::string& name, double error, double us, double bytes);

using OpCall = std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)>;

/// The outputs and the gradients of sum_i (output_i * seeds_i) for every floating-point input.
std::vector<at::Tensor> run_with_gradients(const OpCall& call,
                                           const std::vector<at::Tensor>& inputs,
                                           const std::vector<at::Tensor>& seeds);

/// Expects the kernels' outputs and gradients within `tolerance` (relative_error) of the
/// references', times the forward pass and reports one line. All inputs are on the GPU and take
/// gradients.
///   bytes  what the forward pass has to move
void check_gpu_case(const std::string& name,
                    const OpCall& call,
                    const std::vector<at::Tensor>& inputs,
                    double tolerance,
                    double bytes);

}  // namespace hadal::testing
