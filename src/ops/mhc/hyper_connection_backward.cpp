#include "ops/mhc/hyper_connection_backward.h"

#include <utility>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/gemm/trained_product.h"
#include "ops/mhc/hc_math.h"
#include "ops/mhc/hyper_connection_backward_cpu.h"

namespace hadal::ops {

constinit CpuSlot<void(const HcPostBackwardCpuParams&, int64_t, int64_t)> hc_post_backward_cpu;
constinit CpuSlot<void(const HcPreDotsCpuParams&, int64_t, int64_t)> hc_pre_dots_cpu;
constinit CpuSlot<void(const HcPreStreamsCpuParams&, int64_t, int64_t)> hc_pre_streams_cpu;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr int64_t kGrain = 8;  // tokens

const float* floats(const at::Tensor& x) { return x.const_data_ptr<float>(); }
at::Tensor wide(const at::Tensor& x) { return x.to(at::kFloat).contiguous(); }

/// The gradients at the gates' logits and what comes from them, [tokens, ..] FP32.
struct Gates {
  at::Tensor pre;       ///< [tokens, 4] collapse weights
  at::Tensor dz_rho;    ///< [tokens, rows] at fn v
  at::Tensor v_factor;  ///< [tokens] see hc::logits_backward
  at::Tensor terms;     ///< [tokens, rows + scales] of base, then of scale
};

/// z [tokens, rows] is fn v before rho; d_post and d_comb are unused for the head.
Gates gates_of(const at::Tensor& z,
               const at::Tensor& rho,
               const at::Tensor& base,
               const at::Tensor& scale,
               const at::Tensor& d_pre,
               const at::Tensor& d_post,
               const at::Tensor& d_comb,
               int64_t width,
               const HcParams& params,
               bool head) {
  const int64_t tokens = z.size(0), rows = z.size(1), scales = head ? 1 : 3;
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, z.options()); };
  Gates gates{.pre = empty({tokens, hc::kStreams}),
              .dz_rho = empty({tokens, rows}),
              .v_factor = empty({tokens}),
              .terms = empty({tokens, rows + scales})};
  parallel_for(tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      hc::GateInput<float> in{.z = {},
                              .scale = {},
                              .base = {},
                              .eps = static_cast<float>(params.hc_eps),
                              .iters = static_cast<int>(params.sinkhorn_iters)};
      // Rows that the head does not have stay zero, and so do their gradients.
      float pre[hc::kStreams], post[hc::kStreams] = {}, comb[hc::kCells] = {};
      for (int64_t o = 0; o < rows; ++o) {
        in.z[o] = floats(z)[t * rows + o] * floats(rho)[t];
        in.base[o] = floats(base)[o];
      }
      for (int64_t s = 0; s < scales; ++s) in.scale[s] = floats(scale)[s];
      for (int j = 0; j < hc::kStreams; ++j) {
        pre[j] = floats(d_pre)[t * hc::kStreams + j];
        gates.pre.mutable_data_ptr<float>()[t * hc::kStreams + j] =
            hc::logistic(hc::logit(in, j)) + in.eps;
      }
      float d_logit[hc::kRows] = {}, dz_rho[hc::kRows];
      if (head) {
        for (int j = 0; j < hc::kStreams; ++j) {
          const float weight = hc::logistic(hc::logit(in, j));
          d_logit[j] = pre[j] * weight * (1.0f - weight);
        }
      } else {
        for (int k = 0; d_post.defined() && k < hc::kStreams; ++k)
          post[k] = floats(d_post)[t * hc::kStreams + k];
        for (int i = 0; d_comb.defined() && i < hc::kCells; ++i)
          comb[i] = floats(d_comb)[t * hc::kCells + i];
        hc::gates_backward(in, pre, post, comb, d_logit);
      }
      hc::logits_backward(in, floats(rho)[t], static_cast<float>(width), d_logit, dz_rho,
                          gates.v_factor.mutable_data_ptr<float>()[t]);
      float* terms = gates.terms.mutable_data_ptr<float>() + t * (rows + scales);
      for (int64_t s = 0; s < scales; ++s) terms[rows + s] = 0.0f;
      for (int64_t o = 0; o < rows; ++o) {
        gates.dz_rho.mutable_data_ptr<float>()[t * rows + o] = dz_rho[o];
        terms[o] = d_logit[o];
        terms[rows + hc::scale_index(static_cast<int>(o))] += d_logit[o] * in.z[o];
      }
    }
  });
  return gates;
}

struct HcPreCpu : torch::autograd::Function<HcPreCpu> {
  static variable_list forward(AutogradContext* context,
                               const at::Tensor& streams,
                               const at::Tensor& fn,
                               const at::Tensor& base,
                               const at::Tensor& scale,
                               const TensorFunction& kernel,
                               const HcParams& params,
                               bool head) {
    context->save_for_backward({streams, fn, base, scale});
    context->set_materialize_grads(false);
    context->saved_data["iters"] = params.sinkhorn_iters;
    context->saved_data["norm_eps"] = params.norm_eps;
    context->saved_data["hc_eps"] = params.hc_eps;
    context->saved_data["head"] = head;
    return kernel({streams, fn, base, scale});
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    variable_list grads(7);
    const bool head = context->saved_data["head"].toBool();
    const HcParams params{.sinkhorn_iters = context->saved_data["iters"].toInt(),
                          .norm_eps = context->saved_data["norm_eps"].toDouble(),
                          .hc_eps = context->saved_data["hc_eps"].toDouble()};
    bool wanted = false;
    for (const at::Tensor& grad : grad_outputs) wanted |= grad.defined();
    if (!wanted) return grads;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor streams = saved[0].contiguous(), fn = wide(saved[1]);
    const int64_t tokens = streams.size(0), dim = streams.size(2), width = hc::kStreams * dim;
    const at::Tensor d_mixed = grad_outputs[0].defined()
                                   ? grad_outputs[0].contiguous()
                                   : at::zeros({tokens, dim}, streams.options());
    const at::Tensor flat = at::empty({tokens, width}, fn.options());
    const at::Tensor rho = at::empty({tokens}, fn.options());
    const at::Tensor d_pre = at::empty({tokens, hc::kStreams}, fn.options());
    const HcPreDotsCpuParams dots{.streams = streams.const_data_ptr(),
                                  .d_mixed = d_mixed.const_data_ptr(),
                                  .flat = flat.mutable_data_ptr<float>(),
                                  .rho = rho.mutable_data_ptr<float>(),
                                  .d_pre = d_pre.mutable_data_ptr<float>(),
                                  .dim = dim,
                                  .norm_eps = static_cast<float>(params.norm_eps),
                                  .dtype = element_type(streams)};
    parallel_for(tokens, kGrain,
                 [&](int64_t begin, int64_t end) { hc_pre_dots_cpu(dots, begin, end); });
    const auto grad = [&](size_t i) {
      return !head && grad_outputs[i].defined() ? wide(grad_outputs[i]) : at::Tensor();
    };
    const Gates gates = gates_of(
        linear(flat, pack_panels(fn), GemmRole::kFp32), rho, wide(saved[2]), wide(saved[3]), d_pre,
        head ? at::Tensor() : grad(1), head ? at::Tensor() : grad(2), width, params, head);
    const at::Tensor through_logits = input_gradient(gates.dz_rho, fn);
    const at::Tensor d_streams = at::empty_like(streams);
    const HcPreStreamsCpuParams last{.flat = floats(flat),
                                     .through_logits = floats(through_logits),
                                     .pre = floats(gates.pre),
                                     .v_factor = floats(gates.v_factor),
                                     .d_mixed = d_mixed.const_data_ptr(),
                                     .d_streams = d_streams.mutable_data_ptr(),
                                     .dim = dim,
                                     .dtype = element_type(streams)};
    parallel_for(tokens, kGrain,
                 [&](int64_t begin, int64_t end) { hc_pre_streams_cpu(last, begin, end); });
    const int64_t rows = gates.dz_rho.size(1);
    const at::Tensor sums =
        weight_gradient(gates.terms, at::ones({tokens, 1}, fn.options())).flatten();
    grads[0] = d_streams;
    grads[1] = weight_gradient(gates.dz_rho, flat);
    grads[2] = sums.narrow(0, 0, rows);
    grads[3] = sums.narrow(0, rows, sums.size(0) - rows);
    return grads;
  }
};

struct HcPostCpu : torch::autograd::Function<HcPostCpu> {
  static variable_list forward(AutogradContext* context,
                               const at::Tensor& out,
                               const at::Tensor& streams,
                               const at::Tensor& post,
                               const at::Tensor& comb,
                               const TensorFunction& kernel) {
    context->save_for_backward({out, streams, post, comb});
    context->set_materialize_grads(false);
    return kernel({out, streams, post, comb});
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    variable_list grads(5);
    if (!grad_outputs[0].defined()) return grads;
    const variable_list saved = context->get_saved_variables();
    const at::Tensor streams = saved[1].contiguous(),
                     out = saved[0].to(streams.scalar_type()).contiguous(), post = wide(saved[2]),
                     comb = wide(saved[3]), d_result = grad_outputs[0].contiguous();
    grads[0] = at::empty_like(out);
    grads[1] = at::empty_like(streams);
    grads[2] = at::empty_like(post);
    grads[3] = at::empty_like(comb);
    const HcPostBackwardCpuParams params{.out = out.const_data_ptr(),
                                         .streams = streams.const_data_ptr(),
                                         .post = floats(post),
                                         .comb = floats(comb),
                                         .d_result = d_result.const_data_ptr(),
                                         .d_out = grads[0].mutable_data_ptr(),
                                         .d_streams = grads[1].mutable_data_ptr(),
                                         .d_post = grads[2].mutable_data_ptr<float>(),
                                         .d_comb = grads[3].mutable_data_ptr<float>(),
                                         .dim = streams.size(2),
                                         .dtype = element_type(streams)};
    parallel_for(streams.size(0), kGrain,
                 [&](int64_t begin, int64_t end) { hc_post_backward_cpu(params, begin, end); });
    return grads;
  }
};

bool wants_gradient(const std::vector<at::Tensor>& inputs) {
  bool wanted = false;
  for (const at::Tensor& input : inputs) wanted |= input.requires_grad();
  return wanted && at::GradMode::is_enabled();
}

}  // namespace

bool serves_hc_gradient(const at::Tensor& streams, const HcParams& params) {
  return use_cpu_kernel(streams) && streams.size(1) == hc::kStreams && params.sinkhorn_iters >= 1 &&
         params.sinkhorn_iters <= hc::kMaxIters;
}

std::vector<at::Tensor> with_hc_pre_gradient(const TensorFunction& forward,
                                             const std::vector<at::Tensor>& inputs,
                                             const HcParams& params,
                                             bool head) {
  if (!wants_gradient(inputs)) return forward(inputs);
  return HcPreCpu::apply(inputs[0], inputs[1], inputs[2], inputs[3], forward, params, head);
}

std::vector<at::Tensor> with_hc_post_gradient(const TensorFunction& forward,
                                              const std::vector<at::Tensor>& inputs) {
  if (!wants_gradient(inputs)) return forward(inputs);
  return HcPostCpu::apply(inputs[0], inputs[1], inputs[2], inputs[3], forward);
}

}  // namespace hadal::ops
