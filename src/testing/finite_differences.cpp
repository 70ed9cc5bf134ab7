#include "testing/finite_differences.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <gtest/gtest.h>

#include "base/check.h"
#include "testing/kernel_checks.h"

namespace hadal::testing {
namespace {

/// sum_i <weights_i, plus_i - minus_i>: the difference comes first, so that outputs which do not
/// depend on the entry add exactly nothing.
double projected_difference(const TensorList& plus,
                            const TensorList& minus,
                            const TensorList& weights) {
  double sum = 0.0;
  for (size_t i = 0; i < plus.size(); ++i) {
    // Hidden scores are -inf on both sides; they count as equal.
    const at::Tensor difference =
        at::where(plus[i] == minus[i], at::zeros_like(plus[i]), plus[i] - minus[i]);
    sum += (difference * weights[i]).sum().item<double>();
  }
  return sum;
}

bool same_choices(const TensorList& a, const TensorList& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!at::equal(a[i], b[i])) return false;
  }
  return true;
}

std::vector<int64_t> entries_of(const at::Tensor& value, const DifferenceOptions& options) {
  std::vector<int64_t> entries(static_cast<size_t>(value.numel()));
  std::iota(entries.begin(), entries.end(), int64_t{0});
  if (options.samples > 0 && options.samples < value.numel()) {
    std::mt19937_64 random(options.seed);
    std::shuffle(entries.begin(), entries.end(), random);
    entries.resize(static_cast<size_t>(options.samples));
  }
  return entries;
}

}  // namespace

DifferenceReport compare_differences(const std::string& name,
                                     const std::vector<DifferenceVariable>& variables,
                                     const std::function<TensorList()>& outputs,
                                     const TensorList& weights,
                                     const DifferenceOptions& options,
                                     const std::function<TensorList()>& choices) {
  const at::NoGradGuard no_grad;
  const OneAtenThread one_thread;
  DifferenceReport report;
  for (const DifferenceVariable& variable : variables) {
    HADAL_CHECK(variable.value.scalar_type() == at::kDouble && variable.value.is_contiguous(),
                "finite differences: ", variable.name, " is not contiguous FP64");
    const at::Tensor grad =
        variable.grad.defined() ? variable.grad.contiguous() : at::zeros_like(variable.value);
    const double rms = std::sqrt(grad.square().mean().item<double>());
    double* value = variable.value.detach().mutable_data_ptr<double>();
    for (const int64_t entry : entries_of(variable.value, options)) {
      const double x = value[entry], expected = grad.const_data_ptr<double>()[entry];
      const auto at_offset = [&](double offset, const std::function<TensorList()>& what) {
        value[entry] = x + offset;
        TensorList result = what();
        for (at::Tensor& tensor : result) tensor = tensor.clone();
        value[entry] = x;
        return result;
      };
      // The steps that were really taken, after rounding.
      const double taken = (x + options.step) - (x - options.step);
      const double found = projected_difference(at_offset(options.step, outputs),
                                                at_offset(-options.step, outputs), weights) /
                           taken;
      const double size = std::max(std::abs(expected), rms), error = std::abs(found - expected);
      const bool agrees = error <= options.relative * size + options.absolute;
      if (!agrees && choices &&
          !same_choices(at_offset(options.step, choices), at_offset(-options.step, choices))) {
        ++report.skipped;
        continue;
      }
      ++report.checked;
      EXPECT_TRUE(agrees) << name << ": " << variable.name << "[" << entry << "] gradient "
                          << expected << ", difference " << found;
      const double ratio = error / std::max(size, 1e-3);
      if (!(ratio <= report.worst)) {
        report.worst = ratio;
        report.where = concat(variable.name, "[", entry, "]");
      }
    }
  }
  EXPECT_GT(report.checked, 0) << name;
  EXPECT_LE(static_cast<double>(report.skipped),
            options.max_skipped * static_cast<double>(report.checked + report.skipped))
      << name << ": " << report.skipped << " of " << report.checked + report.skipped
      << " entries skipped";
  std::printf("%-36s %5lld entries, %lld skipped, worst %.1e at %s\n", name.c_str(),
              static_cast<long long>(report.checked), static_cast<long long>(report.skipped),
              report.worst, report.where.c_str());
  return report;
}

DifferenceReport check_gradients(const std::string& name,
                                 const std::function<TensorList(const TensorList&)>& call,
                                 const TensorList& inputs,
                                 const DifferenceOptions& options,
                                 const std::function<TensorList(const TensorList&)>& choices) {
  TensorList leaves, wanted;
  std::vector<DifferenceVariable> variables;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const bool moved = inputs[i].defined() && inputs[i].scalar_type() == at::kDouble;
    leaves.push_back(moved ? inputs[i].detach().clone().requires_grad_(true) : inputs[i]);
    if (!moved) continue;
    wanted.push_back(leaves.back());
    variables.push_back({.name = concat("input ", i), .value = leaves.back().detach(), .grad = {}});
  }
  const TensorList outputs = call(leaves);
  TensorList weights, roots, root_weights;
  at::manual_seed(options.seed);
  for (const at::Tensor& output : outputs) {
    weights.push_back(at::randn_like(output.detach()));
    if (!output.requires_grad()) continue;
    // Where an output is -inf (hidden) it is a constant.
    root_weights.push_back(at::where(at::isfinite(output.detach()), weights.back(), 0.0));
    weights.back() = root_weights.back();
    roots.push_back(output);
  }
  const TensorList grads =
      torch::autograd::grad(roots, wanted, root_weights, /*retain_graph=*/std::nullopt,
                            /*create_graph=*/false, /*allow_unused=*/true);
  for (size_t i = 0; i < grads.size(); ++i) variables[i].grad = grads[i];
  const at::NoGradGuard no_grad;
  TensorList plain;
  size_t next = 0;
  for (const at::Tensor& leaf : leaves) {
    const bool moved = leaf.defined() && leaf.requires_grad();
    plain.push_back(moved ? variables[next++].value : leaf);
  }
  return compare_differences(
      name, variables, [&] { return call(plain); }, weights, options,
      choices ? std::function<TensorList()>([&] { return choices(plain); })
              : std::function<TensorList()>());
}

}  // namespace hadal::testing
