#include "ops/gemm/linear.h"

#include <algorithm>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/math.h"
#include "base/parallel.h"
#include "ops/gemm/panels.h"
#include "ops/quant/round_trip.h"

namespace hadal::ops {
namespace {

at::ScalarType result_type(const at::Tensor& x, GemmRole role) {
  return role == GemmRole::kFp32 ? compute_type(x) : x.scalar_type();
}

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Until hadal's own GEMM kernels exist, BF16 training on CUDA uses the library's: BF16 operands,
/// FP32 accumulation.
bool use_library_gemm(const at::Tensor& x, const at::Tensor& w) {
  return x.is_cuda() && !reference_forced() && x.scalar_type() == at::kBFloat16 &&
         w.scalar_type() == at::kBFloat16;
}

/// lin32: BF16 operands, FP32 result (no rounding of the products' sum).
struct LinearFp32 : torch::autograd::Function<LinearFp32> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& w) {
    context->save_for_backward({x, w});
    return at::mm(x, w.t(), at::kFloat);
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor grad = grad_outputs[0].to(at::kBFloat16);
    at::Tensor grad_x, grad_w;
    if (context->needs_input_grad(0)) grad_x = at::mm(grad, saved[1]);
    if (context->needs_input_grad(1)) grad_w = at::mm(grad.t(), saved[0]);
    return {grad_x, grad_w};
  }
};

}  // namespace

bool quantises_input(GemmRole role, Numerics numerics) {
  return numerics == Numerics::kReleased && (role == GemmRole::kFp8 || role == GemmRole::kFp4);
}

int64_t slab_length(GemmRole role) { return role == GemmRole::kFp4 ? 32 : 128; }

at::Tensor quantise_input(const at::Tensor& x, GemmRole role, Numerics numerics) {
  return quantises_input(role, numerics) ? fp8_round_trip(x, 128) : x;
}

namespace reference {

at::Tensor linear(const at::Tensor& x, const at::Tensor& w, GemmRole role) {
  const at::ScalarType type = compute_type(x);
  return at::linear(x.to(type), w.to(type)).to(result_type(x, role));
}

at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role) {
  const at::Tensor bounds = offsets.to(at::kCPU);
  std::vector<at::Tensor> parts;
  for (int64_t expert = 0; expert < w.size(0); ++expert) {
    const int64_t begin = bounds[expert].item<int64_t>(), end = bounds[expert + 1].item<int64_t>();
    parts.push_back(reference::linear(x.narrow(0, begin, end - begin), w[expert], role));
  }
  return at::cat(parts);
}

at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w) {
  const at::ScalarType type = compute_type(x);
  return at::einsum("tgi,goi->tgo", {x.to(type), w.to(type)}).to(x.scalar_type());
}

}  // namespace reference

constinit CpuSlot<void(const GemmCpuParams&, int64_t, int64_t, int64_t, int64_t)> gemm_cpu;

namespace {

template <typename T>
void pack_matrix(const T* w, T* out_panels, int64_t out, int64_t in) {
  const int64_t padded = (in + 1) / 2 * 2;
  constexpr int64_t kStep = sizeof(T) == 2 ? 2 : 1;  // BF16 keeps pairs of K together
  for (int64_t o = 0; o < out; ++o) {
    T* panel = out_panels + o / kPanelWidth * padded * kPanelWidth + o % kPanelWidth * kStep;
    for (int64_t k = 0; k < in; ++k)
      panel[k / kStep * kStep * kPanelWidth + k % kStep] = w[o * in + k];
  }
}

/// x in the element type of the panels: a BF16 row times FP32 weights is widened.
at::Tensor match(const at::Tensor& x, const Panels& panels) {
  return x.to(panels.data.scalar_type()).contiguous();
}

GemmCpuParams gemm_params(
    const at::Tensor& x, const Panels& panels, int64_t matrix, const at::Tensor& y, GemmRole role) {
  return {
      .x = x.const_data_ptr(),
      .panels = static_cast<const char*>(panels.data.const_data_ptr()) +
                matrix * panels.data.stride(0) * static_cast<int64_t>(panels.data.element_size()),
      .y = y.mutable_data_ptr(),
      .in = panels.in,
      .out = panels.out,
      .x_stride = panels.in,
      .y_stride = panels.out,
      .slab = slab_length(role),
      .type = element_type(x),
      .result = element_type(y)};
}

/// Panels are dealt to threads; which thread computes an output changes no bit of it.
void run_gemm(const GemmCpuParams& params, int64_t rows) {
  const int64_t num_panels = ceil_div(params.out, kPanelWidth);
  // Below some 64K products a second thread costs more than it brings.
  const int64_t grain =
      std::max<int64_t>(4, ceil_div(65536, std::max<int64_t>(1, rows * params.in * kPanelWidth)));
  constexpr int64_t kRowBlock = 64;  // rows that stay in the cache beside a few panels
  parallel_for(num_panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows; row += kRowBlock) {
      gemm_cpu(params, row, std::min(row + kRowBlock, rows), begin, end);
    }
  });
}

at::Tensor linear_kernel(const at::Tensor& x,
                         const at::Tensor& w,
                         GemmRole role,
                         const Panels* given) {
  const Panels packed = given != nullptr && given->data.defined() ? *given : pack_panels(w);
  const at::Tensor input = match(x, packed);
  at::Tensor y = at::empty({x.size(0), packed.out}, x.options().dtype(result_type(x, role)));
  run_gemm(gemm_params(input, packed, 0, y, role), x.size(0));
  return y;
}

at::Tensor grouped_kernel(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role,
                          const Panels* given) {
  const Panels packed = given != nullptr && given->data.defined() ? *given : pack_panels(w);
  const at::Tensor input = match(x, packed);
  at::Tensor y = at::empty({x.size(0), packed.out}, x.options().dtype(result_type(x, role)));
  const int64_t* bounds = offsets.const_data_ptr<int64_t>();
  const int64_t num_panels = ceil_div(packed.out, kPanelWidth);
  std::vector<int64_t> experts;
  for (int64_t expert = 0; expert < packed.data.size(0); ++expert) {
    if (bounds[expert + 1] > bounds[expert]) experts.push_back(expert);
  }
  // Tasks are (expert, panel) pairs, so that few experts with many panels share the threads evenly.
  parallel_for(static_cast<int64_t>(experts.size()) * num_panels, 8,
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end;) {
                   const int64_t expert = experts[static_cast<size_t>(task / num_panels)],
                                 first = task % num_panels;
                   const int64_t last = std::min(num_panels, first + end - task);
                   gemm_cpu(gemm_params(input, packed, expert, y, role), bounds[expert],
                            bounds[expert + 1], first, last);
                   task += last - first;
                 }
               });
  return y;
}

at::Tensor group_kernel(const at::Tensor& x, const at::Tensor& w, const Panels* given) {
  const Panels packed = given != nullptr && given->data.defined() ? *given : pack_panels(w);
  const at::Tensor input = match(x, packed);  // [tokens, groups, in]
  const int64_t groups = x.size(1);
  at::Tensor y = at::empty({x.size(0), groups, packed.out}, x.options());
  for (int64_t group = 0; group < groups; ++group) {
    GemmCpuParams params = gemm_params(input, packed, group, y, GemmRole::kBf16);
    params.x = static_cast<const char*>(params.x) + group * packed.in * input.element_size();
    params.y =
        static_cast<char*>(params.y) + group * packed.out * static_cast<int64_t>(y.element_size());
    params.x_stride = groups * packed.in;
    params.y_stride = groups * packed.out;
    run_gemm(params, x.size(0));
  }
  return y;
}

bool use_gemm_kernel(const at::Tensor& x, const at::Tensor& w) {
  return use_cpu_kernel(x) && (w.scalar_type() == at::kFloat || w.scalar_type() == at::kBFloat16);
}

}  // namespace

Panels pack_panels(const at::Tensor& w) {
  const at::Tensor all = (w.dim() == 2 ? w.unsqueeze(0) : w).detach().contiguous();
  Panels panels{.data = {}, .out = all.size(1), .in = all.size(2)};
  const int64_t elements = packed_panel_elements(panels.out, panels.in);
  panels.data = at::zeros({all.size(0), elements}, all.options());
  parallel_for(all.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t matrix = begin; matrix < end; ++matrix) {
      const int64_t offset = matrix * panels.out * panels.in;
      if (element_type(all) == ElementType::kF32) {
        pack_matrix(all.const_data_ptr<float>() + offset,
                    panels.data.mutable_data_ptr<float>() + matrix * elements, panels.out,
                    panels.in);
      } else {
        pack_matrix(static_cast<const uint16_t*>(all.const_data_ptr()) + offset,
                    static_cast<uint16_t*>(panels.data.mutable_data_ptr()) + matrix * elements,
                    panels.out, panels.in);
      }
    }
  });
  return panels;
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& w, GemmRole role, const Panels* panels) {
  check_shape(x, {-1, -1}, "linear: x");
  check_shape(w, {-1, x.size(1)}, "linear: w");
  if (use_library_gemm(x, w)) {
    return role == GemmRole::kFp32 ? LinearFp32::apply(x, w) : at::linear(x, w);
  }
  if (use_gemm_kernel(x, w)) {
    return with_reference_gradient(
        [&](const auto& in) { return std::vector{linear_kernel(in[0], in[1], role, panels)}; },
        [role](const auto& in) { return std::vector{reference::linear(in[0], in[1], role)}; },
        {x, w})[0];
  }
  return reference::linear(x, w, role);
}

at::Tensor grouped_linear(const at::Tensor& x,
                          const at::Tensor& w,
                          const at::Tensor& offsets,
                          GemmRole role,
                          const Panels* panels) {
  check_shape(x, {-1, -1}, "grouped_linear: x");
  check_shape(w, {-1, -1, x.size(1)}, "grouped_linear: w");
  check_shape(offsets, {w.size(0) + 1}, "grouped_linear: offsets");
  if (use_library_gemm(x, w) && role != GemmRole::kFp32) {
    const at::Tensor ends = offsets.narrow(0, 1, w.size(0)).to(at::kInt);
    return at::_grouped_mm(x, w.transpose(1, 2), ends);
  }
  if (use_gemm_kernel(x, w)) {
    return with_reference_gradient(
        [&](const auto& in) {
          return std::vector{grouped_kernel(in[0], in[1], offsets, role, panels)};
        },
        [offsets, role](const auto& in) {
          return std::vector{reference::grouped_linear(in[0], in[1], offsets, role)};
        },
        {x, w})[0];
  }
  return reference::grouped_linear(x, w, offsets, role);
}

at::Tensor group_linear(const at::Tensor& x, const at::Tensor& w, const Panels* panels) {
  check_shape(x, {-1, -1, -1}, "group_linear: x");
  check_shape(w, {x.size(1), -1, x.size(2)}, "group_linear: w");
  if (use_library_gemm(x, w)) {
    return at::bmm(x.transpose(0, 1), w.transpose(1, 2)).transpose(0, 1);
  }
  if (use_gemm_kernel(x, w)) {
    return with_reference_gradient(
        [&](const auto& in) { return std::vector{group_kernel(in[0], in[1], panels)}; },
        [](const auto& in) { return std::vector{reference::group_linear(in[0], in[1])}; },
        {x, w})[0];
  }
  return reference::group_linear(x, w);
}

}  // namespace hadal::ops
