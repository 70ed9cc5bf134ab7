#include "ops/quant/e4m3_operands.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/math.h"
#include "base/parallel.h"
#include "ops/op.h"
#include "ops/quant/e4m3_operands_cpu.h"

namespace hadal::ops {

constinit CpuSlot<void(const E4m3OperandParams&, int64_t, int64_t)> e4m3_rows_cpu;
constinit CpuSlot<void(const E4m3OperandParams&, int64_t, int64_t)> e4m3_columns_cpu;

namespace {

void check_bounds(const at::Tensor& x, const std::vector<int64_t>& bounds) {
  HADAL_CHECK(!bounds.empty() && bounds.front() == 0 && bounds.back() == x.size(0) &&
                  std::ranges::is_sorted(bounds),
              "e4m3_columns: groups that do not cover ", x.size(0), " rows in order");
}

/// Round trip of groups along the last dimension.
at::Tensor of_groups(const at::Tensor& groups) {
  const at::Tensor values = groups.detach().to(at::kFloat);
  const at::Tensor finite = at::isfinite(values).all(-1, /*keepdim=*/true);
  const double floor = 448.0 * std::ldexp(1.0, -117);
  const at::Tensor amax = values.abs().amax(-1, /*keepdim=*/true).clamp_min(floor);
  // The smallest s with amax <= 448 s; 448 = 0.875 * 2^9.
  const auto [mantissa, exponent] = at::frexp(at::where(finite, amax, 1.0));
  const at::Tensor power = exponent.to(at::kInt) - 9 + (mantissa > 0.875).to(at::kInt);
  const at::Tensor codes =
      at::ldexp(values, -power).clamp(-448.0, 448.0).to(at::kFloat8_e4m3fn).to(at::kFloat);
  return at::where(finite, at::ldexp(codes, power), std::numeric_limits<double>::quiet_NaN())
      .to(groups.scalar_type());
}

}  // namespace

namespace reference {

at::Tensor e4m3_rows(const at::Tensor& x, int64_t group) {
  check_shape(x, {-1, -1}, "e4m3_rows: x");
  std::vector<at::Tensor> parts;
  for (int64_t first = 0; first < x.size(1); first += group)
    parts.push_back(of_groups(x.narrow(1, first, std::min(group, x.size(1) - first))));
  return parts.empty() ? x.detach() : at::cat(parts, 1);
}

at::Tensor e4m3_columns(const at::Tensor& x, const std::vector<int64_t>& bounds) {
  check_shape(x, {-1, -1}, "e4m3_columns: x");
  check_bounds(x, bounds);
  std::vector<at::Tensor> parts;
  for (size_t i = 0; i + 1 < bounds.size(); ++i) {
    if (bounds[i] == bounds[i + 1]) continue;
    parts.push_back(of_groups(x.narrow(0, bounds[i], bounds[i + 1] - bounds[i]).t()).t());
  }
  return parts.empty() ? x.detach() : at::cat(parts);
}

}  // namespace reference

at::Tensor e4m3_rows(const at::Tensor& x_any, int64_t group) {
  check_shape(x_any, {-1, -1}, "e4m3_rows: x");
  HADAL_CHECK(group > 0, "e4m3_rows: groups of ", group);
  if (!use_cpu_kernel(x_any)) return reference::e4m3_rows(x_any, group);
  const at::Tensor x = x_any.detach().contiguous();
  const at::Tensor out = at::empty_like(x);
  const E4m3OperandParams params{.x = x.const_data_ptr(),
                                 .out = out.mutable_data_ptr(),
                                 .width = x.size(1),
                                 .group = group,
                                 .bounds = nullptr,
                                 .dtype = element_type(x)};
  parallel_for(x.size(0), std::max<int64_t>(1, 8192 / std::max<int64_t>(1, params.width)),
               [&](int64_t begin, int64_t end) { e4m3_rows_cpu(params, begin, end); });
  return out;
}

at::Tensor e4m3_columns(const at::Tensor& x_any, const std::vector<int64_t>& bounds) {
  check_shape(x_any, {-1, -1}, "e4m3_columns: x");
  check_bounds(x_any, bounds);
  if (!use_cpu_kernel(x_any)) return reference::e4m3_columns(x_any, bounds);
  const at::Tensor x = x_any.detach().contiguous();
  const at::Tensor out = at::empty_like(x);
  const E4m3OperandParams params{.x = x.const_data_ptr(),
                                 .out = out.mutable_data_ptr(),
                                 .width = x.size(1),
                                 .group = 0,
                                 .bounds = bounds.data(),
                                 .dtype = element_type(x)};
  const int64_t tasks = (std::ssize(bounds) - 1) * ceil_div(x.size(1), kE4m3Columns);
  parallel_for(tasks, 4, [&](int64_t begin, int64_t end) { e4m3_columns_cpu(params, begin, end); });
  return out;
}

}  // namespace hadal::ops
