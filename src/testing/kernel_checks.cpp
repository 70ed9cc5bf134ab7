#include "testing/kernel_checks.h"

#include <cstdio>
#include <cstring>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "base/cpu.h"
#include "base/parallel.h"

namespace hadal::testing {

OneAtenThread::OneAtenThread() : before_(at::get_num_threads()) { at::set_num_threads(1); }
OneAtenThread::~OneAtenThread() { at::set_num_threads(before_); }

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  if (a.sizes() != b.sizes() || a.scalar_type() != b.scalar_type()) return false;
  const at::Tensor x = a.detach().contiguous(), y = b.detach().contiguous();
  return x.numel() == 0 || std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

std::vector<at::Tensor> expect_machine_independent(const KernelCall& call,
                                                   const std::vector<at::Tensor>& inputs) {
  const int threads = num_threads();
  const Isa isa = current_isa();
  std::vector<at::Tensor> first;
  for (int level = 0; level <= static_cast<int>(detect_isa()); ++level) {
    force_isa(static_cast<Isa>(level));
    for (const int count : {1, 2, 5}) {
      set_num_threads(count);
      const std::vector<at::Tensor> outputs = call(inputs);
      if (first.empty()) first = outputs;
      for (size_t i = 0; i < outputs.size(); ++i) {
        EXPECT_TRUE(same_bits(outputs[i], first[i]))
            << "output " << i << " with " << isa_name(static_cast<Isa>(level)) << " and " << count
            << " threads";
      }
    }
  }
  force_isa(isa);
  set_num_threads(threads);
  return first;
}

void expect_row_independent(const KernelCall& call,
                            const std::vector<at::Tensor>& inputs,
                            size_t row_inputs) {
  const std::vector<at::Tensor> together = call(inputs);
  const int64_t rows = inputs[0].size(0);
  const auto part = [&](int64_t begin, int64_t count) {
    std::vector<at::Tensor> cut = inputs;
    for (size_t i = 0; i < row_inputs; ++i) {
      if (cut[i].defined()) cut[i] = cut[i].narrow(0, begin, count);
    }
    const std::vector<at::Tensor> outputs = call(cut);
    for (size_t i = 0; i < outputs.size(); ++i) {
      EXPECT_TRUE(same_bits(outputs[i], together[i].narrow(0, begin, count)))
          << "output " << i << ", rows " << begin << " to " << begin + count;
    }
  };
  for (int64_t row = 0; row < rows; ++row) part(row, 1);
  part(rows / 2, rows - rows / 2);
}

void check_kernel(const char* name,
                  const KernelCall& call,
                  const std::vector<at::Tensor>& inputs,
                  size_t row_inputs,
                  double tolerance) {
  SCOPED_TRACE(name);
  const std::vector<at::Tensor> found = expect_machine_independent(call, inputs);
  expect_row_independent(call, inputs, row_inputs);
  std::vector<at::Tensor> exact_inputs;
  for (const at::Tensor& input : inputs) {
    const bool real = input.defined() && input.is_floating_point();
    exact_inputs.push_back(real ? input.to(at::kDouble) : input);
  }
  const std::vector<at::Tensor> expected = call(exact_inputs);
  double worst = 0.0;
  for (size_t i = 0; i < found.size(); ++i) {
    const at::Tensor x = found[i].to(at::kDouble), y = expected[i].to(at::kDouble);
    const at::Tensor finite = at::isfinite(y);
    EXPECT_TRUE(at::equal(at::where(finite, 0.0, x), at::where(finite, 0.0, y))) << "output " << i;
    const at::Tensor difference = at::where(finite, x - y, 0.0).abs();
    const double scale = at::where(finite, y, 0.0).abs().max().item<double>();
    const double error = difference.max().item<double>() / (scale > 0.0 ? scale : 1.0);
    EXPECT_LE(error, tolerance) << "output " << i;
    worst = std::max(worst, error);
  }
  std::printf("%-36s kernel against float64: %.1e\n", name, worst);
}

}  // namespace hadal::testing
