#include "ops/quant/round_trip.h"

#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/quant/round_trip_cpu.h"
#include "ops/quant/round_trip_kernels.h"

namespace hadal::ops {
namespace {

/// 2^ceil(log2 r) for positive normal FP32 r, read off the bits.
at::Tensor power_of_two_above(const at::Tensor& r) {
  const at::Tensor bits = r.contiguous().view(at::kInt);
  const at::Tensor exponent =
      bits.bitwise_right_shift(23) + bits.bitwise_and(0x7fffff).ne(0).to(at::kInt);
  return exponent.bitwise_left_shift(23).view(at::kFloat);
}

struct Groups {
  at::Tensor values;  // [..., dim / group, group] FP32
  at::Tensor scale;   // [..., dim / group, 1] FP32
};

Groups scale_groups(const at::Tensor& x, int64_t group, float largest, float floor) {
  HADAL_CHECK(x.dim() >= 1 && x.size(-1) % group == 0, "round_trip: dim ", x.sizes(),
              " is no multiple of the group ", group);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() /= group;
  shape.push_back(group);
  Groups result;
  result.values = x.detach().to(at::kFloat).reshape(shape);
  // A NaN stays one and leaves the others alone.
  const at::Tensor amax = at::where(result.values.isnan(), 0.0, result.values.abs())
                              .amax(-1, /*keepdim=*/true)
                              .clamp_min(floor);
  result.scale = power_of_two_above(amax * (1.0f / largest));
  return result;
}

}  // namespace

namespace reference {

at::Tensor fp8_round_trip(const at::Tensor& x, int64_t group) {
  const Groups groups = scale_groups(x, group, 448.0f, 1e-4f);
  const at::Tensor codes =
      (groups.values / groups.scale).clamp(-448.0, 448.0).to(at::kFloat8_e4m3fn);
  const at::Tensor rounded = codes.to(at::kFloat) * groups.scale;
  return straight_through(rounded.reshape(x.sizes()).to(x.scalar_type()), x);
}

at::Tensor fp4_round_trip(const at::Tensor& x, int64_t group) {
  const Groups groups = scale_groups(x, group, 6.0f, 6.0f * std::ldexp(1.0f, -126));
  const at::Tensor rounded = round_to_e2m1(groups.values / groups.scale) * groups.scale;
  return straight_through(rounded.reshape(x.sizes()).to(x.scalar_type()), x);
}

}  // namespace reference

at::Tensor round_to_e2m1(const at::Tensor& x) {
  const at::Tensor magnitude = x.abs().clamp_max(6.0);
  // Steps of 1/2 below 2, of 1 below 4, of 2 above; at::round takes ties to even, which within each
  // range is the even code (2.5 -> 2 and 5 -> 4 included: their codes 4 and 6 are even).
  const at::Tensor fine = at::round(magnitude * 2.0) * 0.5;
  const at::Tensor middle = at::round(magnitude);
  const at::Tensor coarse = at::round(magnitude * 0.5) * 2.0;
  const at::Tensor rounded =
      at::where(magnitude < 2.0, fine, at::where(magnitude < 4.0, middle, coarse));
  return at::copysign(rounded, x);
}

constinit CpuSlot<void(const RoundTripCpuParams&, int64_t, int64_t)> fp8_round_trip_cpu;
constinit CpuSlot<void(const RoundTripCpuParams&, int64_t, int64_t)> fp4_round_trip_cpu;

namespace {

at::Tensor run_cpu(const CpuSlot<void(const RoundTripCpuParams&, int64_t, int64_t)>& kernel,
                   const at::Tensor& x,
                   int64_t dim,
                   int64_t group) {
  HADAL_CHECK(dim > 0 && dim <= x.size(-1) && dim % group == 0, "round_trip: ", dim, " of ",
              x.sizes(), " is no multiple of the group ", group);
  const at::Tensor input = x.contiguous();
  at::Tensor out = at::empty_like(input);
  const RoundTripCpuParams params{.x = input.const_data_ptr(),
                                  .out = out.mutable_data_ptr(),
                                  .stride = x.size(-1),
                                  .dim = dim,
                                  .group = group,
                                  .dtype = element_type(x)};
  parallel_for(input.numel() / params.stride, std::max<int64_t>(1, 8192 / params.stride),
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return straight_through(out, x);
}

}  // namespace

constinit KernelSlot<void(const RoundTripParams&, Stream)> round_trip_cuda;

namespace {

bool use_cuda(const at::Tensor& x, int64_t dim, int64_t group) {
  return use_cuda_kernel(x) && round_trip_cuda && x.size(-1) % 4 == 0 && dim > 0 &&
         dim <= x.size(-1) && dim % group == 0 && (group == 32 || group == 64 || group % 128 == 0);
}

at::Tensor run_cuda(const at::Tensor& x, int64_t dim, int64_t group, bool fp4) {
  const at::Tensor input = kernel_input(x.detach());
  const at::Tensor out = at::empty_like(input);
  round_trip_cuda({.x = input.const_data_ptr(),
                   .out = out.mutable_data_ptr(),
                   .rows = input.numel() / input.size(-1),
                   .stride = input.size(-1),
                   .dim = dim,
                   .group = group,
                   .fp4 = fp4,
                   .type = element_type(input)},
                  current_stream(input));
  return straight_through(out, x);
}

}  // namespace

at::Tensor fp8_round_trip(const at::Tensor& x, int64_t group) {
  if (use_cuda(x, x.size(-1), group)) return run_cuda(x, x.size(-1), group, false);
  if (use_cpu_kernel(x)) return run_cpu(fp8_round_trip_cpu, x, x.size(-1), group);
  return reference::fp8_round_trip(x, group);
}

at::Tensor fp4_round_trip(const at::Tensor& x, int64_t group) {
  if (use_cuda(x, x.size(-1), group)) return run_cuda(x, x.size(-1), group, true);
  if (use_cpu_kernel(x)) return run_cpu(fp4_round_trip_cpu, x, x.size(-1), group);
  return reference::fp4_round_trip(x, group);
}

at::Tensor fp8_round_trip_leading(const at::Tensor& x, int64_t dim, int64_t group) {
  if (use_cuda(x, dim, group)) return run_cuda(x, dim, group, false);
  if (use_cpu_kernel(x)) return run_cpu(fp8_round_trip_cpu, x, dim, group);
  return at::cat({fp8_round_trip(x.narrow(-1, 0, dim), group), x.narrow(-1, dim, x.size(-1) - dim)},
                 -1);
}

}  // namespace hadal::ops
