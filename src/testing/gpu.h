// Helpers of tests and benches that run on the GPU machine.
#pragma once

#include <functional>
#include <string>

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

}  // namespace hadal::testing
