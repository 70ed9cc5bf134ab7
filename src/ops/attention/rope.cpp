#include "ops/attention/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/attention/rope_cpu.h"
#include "ops/attention/rope_kernels.h"
#include "ops/op.h"

namespace hadal::ops {

constinit KernelSlot<void(const RopeParams&, Stream)> rope_cuda;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor rotate_on_gpu(const at::Tensor& x_any, const at::Tensor& cos_sin, bool inverse) {
  const at::Tensor x = kernel_input(x_any);
  const at::Tensor out = at::empty_like(x);
  rope_cuda({.x = x.const_data_ptr(),
             .cos_sin = cos_sin.const_data_ptr<float>(),
             .out = out.data_ptr(),
             .tokens = x.size(0),
             .heads = x.numel() / (x.size(0) * x.size(-1)),
             .dim = x.size(-1),
             .rope_dim = cos_sin.size(1) * 2,
             .inverse = inverse,
             .type = element_type(x)},
            current_stream(x));
  return out;
}

/// The CUDA kernel; the gradient of a rotation is the inverse rotation.
struct Rope : torch::autograd::Function<Rope> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& cos_sin,
                            bool inverse) {
    context->save_for_backward({cos_sin});
    context->saved_data["inverse"] = inverse;
    return rotate_on_gpu(x, cos_sin, inverse);
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const at::Tensor cos_sin = context->get_saved_variables()[0];
    const bool inverse = context->saved_data["inverse"].toBool();
    return {rotate_on_gpu(grad_outputs[0], cos_sin, !inverse), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

RopeTable::RopeTable(int64_t rope_dim, double base, const YarnParams* yarn) {
  HADAL_CHECK(rope_dim > 0 && rope_dim % 2 == 0, "rope: rope_dim ", rope_dim, " is not even");
  const int64_t half = rope_dim / 2;
  const auto correction_dim = [&](double rotations) {
    return static_cast<double>(rope_dim) *
           std::log(static_cast<double>(yarn->original_seq_len) /
                    (rotations * 2.0 * std::numbers::pi)) /
           (2.0 * std::log(base));
  };
  float low = 0.0f, high = 0.0f;
  if (yarn != nullptr) {
    low = static_cast<float>(std::max(std::floor(correction_dim(yarn->beta_fast)), 0.0));
    high = static_cast<float>(
        std::min(std::ceil(correction_dim(yarn->beta_slow)), static_cast<double>(rope_dim - 1)));
    if (low == high) high += 0.001f;
  }
  for (int64_t i = 0; i < half; ++i) {
    // The power is rounded to FP32 before the reciprocal, as the official table does.
    const float power = static_cast<float>(
        std::pow(base, static_cast<double>(2 * i) / static_cast<double>(rope_dim)));
    float frequency = 1.0f / power;
    if (yarn != nullptr && yarn->factor != 1.0) {  // a factor of 1 must not even round
      const float ramp = std::clamp((static_cast<float>(i) - low) / (high - low), 0.0f, 1.0f);
      frequency = (frequency / static_cast<float>(yarn->factor)) * ramp + frequency * (1.0f - ramp);
    }
    frequencies_.push_back(frequency);
  }
}

at::Tensor RopeTable::compute(const at::Tensor& pos) const {
  const at::Tensor host_pos = pos.contiguous();
  constexpr int64_t kGrain = 16;  // rows of some 50 us
  const int64_t count = host_pos.size(0), half = static_cast<int64_t>(frequencies_.size());
  at::Tensor table = at::empty({count, half, 2}, at::kFloat);
  const int64_t* p = host_pos.const_data_ptr<int64_t>();
  float* const first = table.data_ptr<float>();
  parallel_for(count, kGrain, [&](int64_t begin, int64_t end) {
    float* out = first + 2 * begin * half;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(p[row]) * frequencies_[static_cast<size_t>(i)];
        *out++ = static_cast<float>(std::cos(static_cast<double>(angle)));
        *out++ = static_cast<float>(std::sin(static_cast<double>(angle)));
      }
    }
  });
  return table;
}

at::Tensor RopeTable::cos_sin(const at::Tensor& pos, int64_t max_pos) const {
  check_shape(pos, {-1}, "rope: pos");
  // Tables of the first positions are kept. On the CPU of few: rows cost a thousandth of what a
  // model does with them, and tables of a long context would take as much memory as its cache. On
  // another device of all: positions are not fetched from there (256 MB for a million of them).
  constexpr int64_t kMostKept = 2048;
  if (pos.is_cpu() && (max_pos >= kMostKept || pos.size(0) <= 16)) return compute(pos);
  at::Tensor table;
  {
    std::lock_guard<std::mutex> lock(cache_->mutex);
    for (const at::Tensor& cached : cache_->tables) {
      if (cached.device() == pos.device() && cached.size(0) > max_pos && !table.defined())
        table = cached;
    }
    if (!table.defined()) {
      int64_t rows = 1024;
      while (rows <= max_pos) rows *= 2;
      table = compute(at::arange(rows, at::kLong)).to(pos.device());
      // What was recorded with a shorter table goes on reading it, and all of them together are as
      // long as the longest once more.
      if (pos.is_cpu())
        std::erase_if(cache_->tables, [](const at::Tensor& t) { return t.is_cpu(); });
      cache_->tables.push_back(table);
    }
  }
  return table.index_select(0, pos);
}

namespace reference {

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos_sin, bool inverse) {
  const int64_t rope_dim = cos_sin.size(1) * 2, dim = x.size(-1);
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()), 1);
  shape.front() = x.size(0);
  shape.back() = rope_dim / 2;
  const at::ScalarType type = compute_type(x);
  const at::Tensor cos = cos_sin.select(-1, 0).to(type).reshape(shape);
  at::Tensor sin = cos_sin.select(-1, 1).to(type).reshape(shape);
  if (inverse) sin = -sin;
  const at::Tensor pairs =
      x.narrow(-1, dim - rope_dim, rope_dim).to(type).unflatten(-1, {rope_dim / 2, 2});
  const at::Tensor even = pairs.select(-1, 0), odd = pairs.select(-1, 1);
  const at::Tensor rotated = at::stack({even * cos - odd * sin, even * sin + odd * cos}, -1)
                                 .flatten(-2)
                                 .to(x.scalar_type());
  return at::cat({x.narrow(-1, 0, dim - rope_dim), rotated}, -1);
}

}  // namespace reference

constinit CpuSlot<void(const RopeCpuParams&, int64_t, int64_t)> rope_cpu;

namespace {

at::Tensor run_cpu(const at::Tensor& x, const at::Tensor& cos_sin, bool inverse) {
  const at::Tensor input = x.contiguous(), table = cos_sin.contiguous();
  at::Tensor out = at::empty_like(input);
  const int64_t tokens = x.size(0), dim = x.size(-1);
  const RopeCpuParams params{.x = input.const_data_ptr(),
                             .out = out.mutable_data_ptr(),
                             .cos_sin = table.const_data_ptr<float>(),
                             .heads = tokens == 0 ? 0 : input.numel() / (tokens * dim),
                             .dim = dim,
                             .rope_dim = cos_sin.size(1) * 2,
                             .dtype = element_type(x),
                             .inverse = inverse};
  parallel_for(tokens, 8, [&](int64_t begin, int64_t end) { rope_cpu(params, begin, end); });
  return out;
}

/// The CPU kernel; the gradient of a rotation is the inverse rotation.
struct RopeCpu : torch::autograd::Function<RopeCpu> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& x,
                            const at::Tensor& cos_sin,
                            bool inverse) {
    context->save_for_backward({cos_sin});
    context->set_materialize_grads(false);
    context->saved_data["inverse"] = inverse;
    return run_cpu(x, cos_sin, inverse);
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    if (!grad_outputs[0].defined()) return variable_list(3);
    const at::Tensor cos_sin = context->get_saved_variables()[0];
    const bool inverse = context->saved_data["inverse"].toBool();
    return {run_cpu(grad_outputs[0], cos_sin, !inverse), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor rope(const at::Tensor& x, const at::Tensor& cos_sin, bool inverse) {
  check_shape(cos_sin, {x.size(0), -1, 2}, "rope: cos_sin");
  HADAL_CHECK(cos_sin.size(1) * 2 <= x.size(-1), "rope: rotates ", cos_sin.size(1) * 2,
              " channels of ", x.size(-1));
  if (use_cuda_kernel(x) && rope_cuda && x.size(-1) % 2 == 0) {
    return Rope::apply(x, kernel_input(cos_sin.to(at::kFloat)), inverse);
  }
  if (use_cpu_kernel(x)) {
    const bool trains = at::GradMode::is_enabled() && x.requires_grad();
    return trains ? RopeCpu::apply(x, cos_sin, inverse) : run_cpu(x, cos_sin, inverse);
  }
  return reference::rope(x, cos_sin, inverse);
}

}  // namespace hadal::ops
