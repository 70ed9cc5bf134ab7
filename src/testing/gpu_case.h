// One case of gpu_test: the kernel against the reference, forward and gradients, then its time.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "ops/op.h"

namespace hadal::testing {

using OpCall = std::function<at::Tensor(const std::vector<at::Tensor>&)>;

/// Largest |a - b| over the largest |b|.
inline double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor wide = b.to(at::kDouble);
  return ((a.to(at::kDouble) - wide).abs().max() / wide.abs().max().clamp_min(1e-30))
      .item<double>();
}

/// The output and the gradients of sum(output * seed) for every input.
inline std::vector<at::Tensor> run_with_gradients(const OpCall& call,
                                                  const std::vector<at::Tensor>& inputs,
                                                  const at::Tensor& seed) {
  std::vector<at::Tensor> leaves;
  for (const at::Tensor& input : inputs) leaves.push_back(input.detach().requires_grad_(true));
  const at::Tensor out = call(leaves);
  std::vector<at::Tensor> results = {out.detach()};
  for (const at::Tensor& grad : torch::autograd::grad({out}, leaves, {seed.to(out.scalar_type())}))
    results.push_back(grad);
  return results;
}

/// Compares and prints one line; `bytes` is what the forward pass must move. All inputs are on the
/// GPU and take gradients.
inline void check_gpu_case(const std::string& name,
                           const OpCall& call,
                           const std::vector<at::Tensor>& inputs,
                           double tolerance,
                           double bytes) {
  const at::Tensor seed = at::randn_like(call(inputs));
  const std::vector<at::Tensor> found = run_with_gradients(call, inputs, seed);
  std::vector<at::Tensor> expected;
  {
    ops::ReferenceGuard guard;
    expected = run_with_gradients(call, inputs, seed);
  }
  double worst = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = relative_error(found[i], expected[i]);
    EXPECT_LE(error, tolerance) << name << (i == 0 ? " output" : " gradient ") << i;
    worst = std::max(worst, error);
  }
  std::vector<double> times;
  for (int run = 0; run < 23; ++run) {
    seed.flatten()[0].item();  // waits for the stream
    const auto begin = std::chrono::steady_clock::now();
    at::Tensor out;
    for (int i = 0; i < 10; ++i) out = call(inputs);
    out.flatten()[0].item();
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - begin;
    if (run >= 3) times.push_back(spent.count() / 10);
  }
  std::sort(times.begin(), times.end());
  const double seconds = times[times.size() / 2];
  std::printf("%-28s error %.2e  %9.1f us  %7.1f GB/s  %5.1f %% of 4.3 TB/s\n", name.c_str(), worst,
              seconds * 1e6, bytes / seconds * 1e-9, bytes / seconds / 4.3e12 * 100);
}

}  // namespace hadal::testing
