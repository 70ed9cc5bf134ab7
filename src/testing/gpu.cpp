#include "testing/gpu.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include <ATen/ATen.h>

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

}  // namespace hadal::testing
