#include "testing/gpu.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "ops/op.h"

namespace hadal::testing {

void synchronize() {
  // Reading one element waits for the stream; the CUDA runtime itself is not linked here.
  at::ones({1}, at::TensorOptions(at::kCUDA)).item<float>();
}

double median_us(const std::function<void()>& body, int repeats) {
  for (int i = 0; i < 3; ++i) body();
  synchronize();
  std::vector<double> times;
  for (int i = 0; i < repeats; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    body();
    synchronize();
    times.push_back(
        std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin)
            .count());
  }
  std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
  return times[static_cast<size_t>(repeats / 2)];
}

double relative_error(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.detach().to(at::kDouble), y = b.detach().to(at::kDouble);
  const double scale = y.norm().item<double>();
  return (x - y).norm().item<double>() / (scale > 0.0 ? scale : 1.0);
}

void report(const std::string& name, double error, double us, double bytes) {
  constexpr double kCopyBytesPerSecond = 4.3e12;  // measured copy rate of an H200
  const double rate = bytes / (us * 1e-6);
  std::printf("%-44s error %9.2e %10.1f us %8.1f GB/s %5.1f %%\n", name.c_str(), error, us,
              rate * 1e-9, 100.0 * rate / kCopyBytesPerSecond);
  std::fflush(stdout);
}

std::vector<at::Tensor> run_with_gradients(const OpCall& call,
                                           const std::vector<at::Tensor>& inputs,
                                           const std::vector<at::Tensor>& seeds) {
  std::vector<at::Tensor> leaves, wanted;
  for (const at::Tensor& input : inputs) {
    leaves.push_back(input.detach());
    if (!input.is_floating_point()) continue;
    leaves.back().requires_grad_(true);
    wanted.push_back(leaves.back());
  }
  const std::vector<at::Tensor> outputs = call(leaves);
  std::vector<at::Tensor> results, typed_seeds;
  for (size_t i = 0; i < outputs.size(); ++i) {
    results.push_back(outputs[i].detach());
    typed_seeds.push_back(seeds[i].to(outputs[i].scalar_type()));
  }
  for (const at::Tensor& grad : torch::autograd::grad(outputs, wanted, typed_seeds)) {
    results.push_back(grad);
  }
  return results;
}

void check_gpu_case(const std::string& name,
                    const OpCall& call,
                    const std::vector<at::Tensor>& inputs,
                    double tolerance,
                    double bytes) {
  std::vector<at::Tensor> seeds;
  for (const at::Tensor& output : call(inputs)) seeds.push_back(at::randn_like(output));
  const std::vector<at::Tensor> found = run_with_gradients(call, inputs, seeds);
  std::vector<at::Tensor> expected;
  {
    const ops::ReferenceGuard guard;
    expected = run_with_gradients(call, inputs, seeds);
  }
  double worst = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const bool is_output = i < seeds.size();
    const double error = relative_error(found[i], expected[i]);
    EXPECT_LE(error, tolerance) << name << (is_output ? " output " : " gradient ")
                                << (is_output ? i : i - seeds.size());
    worst = std::max(worst, error);
  }
  report(name, worst, median_us([&] { call(inputs); }), bytes);
}

}  // namespace hadal::testing
