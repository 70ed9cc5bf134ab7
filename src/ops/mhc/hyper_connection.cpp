#include "ops/mhc/hyper_connection.h"

#include <algorithm>
#include <array>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/mhc/hc_math.h"
#include "ops/mhc/hyper_connection_backward.h"
#include "ops/mhc/hyper_connection_cpu.h"
#include "ops/mhc/hyper_connection_kernels.h"
#include "ops/mhc/hyper_connection_sm90.h"
#include "ops/mhc/sm90_hyper_connection.h"
#include "ops/op.h"
#include "ops/sm90.h"
#include "ops/tape.h"

namespace hadal::ops {
namespace {

/// z = (fn v) * rho with v the concatenated streams and rho their reciprocal RMS: [tokens, rows].
at::Tensor mixing_logits(const at::Tensor& flat, const at::Tensor& fn, double norm_eps) {
  const at::Tensor rho = at::rsqrt(flat.square().mean(-1, /*keepdim=*/true) + norm_eps);
  return at::linear(flat, fn.to(flat.scalar_type())) * rho;
}

at::Tensor weighted_sum(const at::Tensor& weights, const at::Tensor& streams) {
  return (weights.unsqueeze(-1) * to_compute(streams)).sum(1).to(streams.scalar_type());
}

}  // namespace

namespace reference {

at::Tensor sinkhorn(const at::Tensor& logits, int64_t iters, double eps) {
  at::Tensor p = at::softmax(logits, -1) + eps;
  p = p / (p.sum(-2, /*keepdim=*/true) + eps);
  for (int64_t i = 1; i < iters; ++i) {
    p = p / (p.sum(-1, /*keepdim=*/true) + eps);
    p = p / (p.sum(-2, /*keepdim=*/true) + eps);
  }
  return p;
}

HcPre hc_pre(const at::Tensor& streams,
             const at::Tensor& fn,
             const at::Tensor& base,
             const at::Tensor& scale,
             const HcParams& params) {
  const int64_t n = streams.size(1);
  const at::Tensor flat = to_compute(streams).flatten(1);         // [tokens, n dim]
  const at::Tensor z = mixing_logits(flat, fn, params.norm_eps);  // [tokens, (2 + n) n]
  const at::Tensor s = scale.to(z.scalar_type()), b = base.to(z.scalar_type());
  const at::Tensor pre = at::sigmoid(z.narrow(1, 0, n) * s[0] + b.narrow(0, 0, n)) + params.hc_eps;
  const at::Tensor post = 2 * at::sigmoid(z.narrow(1, n, n) * s[1] + b.narrow(0, n, n));
  const at::Tensor logits = z.narrow(1, 2 * n, n * n) * s[2] + b.narrow(0, 2 * n, n * n);
  return {.mixed = weighted_sum(pre, streams),
          .post = post,
          .comb = sinkhorn(logits.unflatten(1, {n, n}), params.sinkhorn_iters, params.hc_eps)};
}

at::Tensor hc_post(const at::Tensor& out,
                   const at::Tensor& streams,
                   const at::Tensor& post,
                   const at::Tensor& comb) {
  const at::Tensor carried = at::bmm(comb.transpose(1, 2), to_compute(streams));
  return (post.unsqueeze(-1) * to_compute(out).unsqueeze(1) + carried).to(streams.scalar_type());
}

at::Tensor hc_head(const at::Tensor& streams,
                   const at::Tensor& fn,
                   const at::Tensor& base,
                   const at::Tensor& scale,
                   const HcParams& params) {
  const at::Tensor z = mixing_logits(to_compute(streams).flatten(1), fn, params.norm_eps);
  const at::Tensor weights =
      at::sigmoid(z * scale.to(z.scalar_type()) + base.to(z.scalar_type())) + params.hc_eps;
  return weighted_sum(weights, streams);
}

}  // namespace reference

constinit CpuSlot<void(const HcPreCpuParams&, int64_t, int64_t)> hc_pre_cpu;
constinit CpuSlot<void(const HcPostCpuParams&, int64_t, int64_t)> hc_post_cpu;

namespace {

/// The kernel of hc_pre (head false) and hc_head (head true).
std::vector<at::Tensor> run_pre_cpu(const std::vector<at::Tensor>& in,
                                    const HcParams& params,
                                    bool head) {
  const at::Tensor streams = in[0].contiguous(), fn = in[1].to(at::kFloat).contiguous(),
                   base = in[2].to(at::kFloat).contiguous(),
                   scale = in[3].to(at::kFloat).contiguous();
  const int64_t tokens = streams.size(0), n = streams.size(1), dim = streams.size(2);
  at::Tensor mixed = at::empty({tokens, dim}, streams.options());
  at::Tensor post, comb;
  if (!head) {
    post = at::empty({tokens, n}, fn.options());
    comb = at::empty({tokens, n, n}, fn.options());
  }
  const HcPreCpuParams kernel{.streams = streams.const_data_ptr(),
                              .fn = fn.const_data_ptr<float>(),
                              .base = base.const_data_ptr<float>(),
                              .scale = scale.const_data_ptr<float>(),
                              .mixed = mixed.mutable_data_ptr(),
                              .post = head ? nullptr : post.mutable_data_ptr<float>(),
                              .comb = head ? nullptr : comb.mutable_data_ptr<float>(),
                              .n = n,
                              .dim = dim,
                              .sinkhorn_iters = params.sinkhorn_iters,
                              .norm_eps = static_cast<float>(params.norm_eps),
                              .hc_eps = static_cast<float>(params.hc_eps),
                              .dtype = element_type(streams),
                              .head = head};
  parallel_for(tokens, 1, [&](int64_t begin, int64_t end) { hc_pre_cpu(kernel, begin, end); });
  if (head) return {mixed};
  return {mixed, post, comb};
}

std::vector<at::Tensor> run_post_cpu(const std::vector<at::Tensor>& in) {
  const at::Tensor out = in[0].contiguous(), streams = in[1].contiguous(),
                   post = in[2].contiguous(), comb = in[3].contiguous();
  at::Tensor result = at::empty_like(streams);
  const HcPostCpuParams kernel{.out = out.const_data_ptr(),
                               .streams = streams.const_data_ptr(),
                               .post = post.const_data_ptr<float>(),
                               .comb = comb.const_data_ptr<float>(),
                               .result = result.mutable_data_ptr(),
                               .n = streams.size(1),
                               .dim = streams.size(2),
                               .dtype = element_type(streams)};
  parallel_for(streams.size(0), 4,
               [&](int64_t begin, int64_t end) { hc_post_cpu(kernel, begin, end); });
  return {result};
}

bool use_kernel(const at::Tensor& streams) {
  return use_cpu_kernel(streams) && streams.size(1) <= kHcMaxStreams;
}

}  // namespace

constinit KernelSlot<void(const HcPreParams&, Stream)> hc_pre_cuda;
constinit KernelSlot<void(const HcPreBackwardParams&, Stream)> hc_pre_backward_cuda;
constinit KernelSlot<void(const HcPostParams&, Stream)> hc_post_cuda;
constinit KernelSlot<void(const HcPostBackwardParams&, Stream)> hc_post_backward_cuda;

namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

bool use_cuda(const at::Tensor& streams) {
  return use_cuda_kernel(streams) && streams.size(1) == hc::kStreams && streams.size(2) % 4 == 0;
}

bool use_pre_cuda(const at::Tensor& streams, const HcParams& params) {
  return use_cuda(streams) && hc_pre_cuda && hc_pre_backward_cuda && params.sinkhorn_iters >= 1 &&
         params.sinkhorn_iters <= hc::kMaxIters;
}

at::Tensor float_input(const at::Tensor& x) { return kernel_input(x.to(at::kFloat)); }

/// dz_rho^T flat. For BF16 streams the product runs on the tensor cores with dz_rho as the sum of
/// two BF16 numbers, which leaves an error of about 2^-17 of each term.
at::Tensor fn_gradient(const at::Tensor& dz_rho, const at::Tensor& flat) {
  if (flat.scalar_type() == at::kFloat) return at::mm(dz_rho.t(), flat);
  const at::Tensor high = dz_rho.to(flat.scalar_type());
  const at::Tensor low = (dz_rho - high.to(at::kFloat)).to(flat.scalar_type());
  const at::Tensor both = at::mm(at::cat({high, low}, 1).t(), flat, at::kFloat);
  return both.narrow(0, 0, hc::kRows) + both.narrow(0, hc::kRows, hc::kRows);
}

/// The CUDA kernels; fn, base and scale FP32.
struct HcPreFunction : torch::autograd::Function<HcPreFunction> {
  static variable_list forward(AutogradContext* context,
                               const at::Tensor& streams_any,
                               const at::Tensor& fn_any,
                               const at::Tensor& base_any,
                               const at::Tensor& scale_any,
                               const HcParams& params) {
    const at::Tensor streams = kernel_input(streams_any), fn = kernel_input(fn_any),
                     base = kernel_input(base_any), scale = kernel_input(scale_any);
    const int64_t tokens = streams.size(0), dim = streams.size(2);
    const at::Tensor mixed = at::empty({tokens, dim}, streams.options());
    const at::Tensor post = at::empty({tokens, hc::kStreams}, fn.options());
    const at::Tensor comb = at::empty({tokens, hc::kStreams, hc::kStreams}, fn.options());
    const at::Tensor z = at::empty({tokens, hc::kRows}, fn.options());
    const at::Tensor rho = at::empty({tokens}, fn.options());
    hc_pre_cuda({.streams = streams.const_data_ptr(),
                 .fn = fn.const_data_ptr<float>(),
                 .base = base.const_data_ptr<float>(),
                 .scale = scale.const_data_ptr<float>(),
                 .mixed = mixed.mutable_data_ptr(),
                 .post = post.mutable_data_ptr<float>(),
                 .comb = comb.mutable_data_ptr<float>(),
                 .z = z.mutable_data_ptr<float>(),
                 .rho = rho.mutable_data_ptr<float>(),
                 .tokens = tokens,
                 .dim = dim,
                 .iters = static_cast<int>(params.sinkhorn_iters),
                 .norm_eps = static_cast<float>(params.norm_eps),
                 .hc_eps = static_cast<float>(params.hc_eps),
                 .type = element_type(streams)},
                current_stream(streams));
    context->save_for_backward({streams, fn, base, scale, z, rho});
    context->saved_data["iters"] = params.sinkhorn_iters;
    context->saved_data["hc_eps"] = params.hc_eps;
    return {mixed, post, comb};
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor &streams = saved[0], &fn = saved[1], &z = saved[4];
    const at::Tensor d_mixed = kernel_input(grad_outputs[0]),
                     d_post = kernel_input(grad_outputs[1]), d_comb = kernel_input(grad_outputs[2]);
    const int64_t tokens = streams.size(0), dim = streams.size(2);
    // The partition of the sums over tokens depends on their number only.
    const int64_t num_parts = std::clamp<int64_t>((tokens + 127) / 128, 1, 1024);
    const at::Tensor d_streams = at::empty_like(streams), dz_rho = at::empty_like(z);
    const at::Tensor factors = at::empty({tokens, hc::kStreams + 1}, z.options());
    const at::Tensor parts = at::empty({num_parts, hc::kRows + 3}, z.options());
    const at::Tensor sums = at::empty({hc::kRows + 3}, z.options());
    hc_pre_backward_cuda({.streams = streams.const_data_ptr(),
                          .fn = fn.const_data_ptr<float>(),
                          .base = saved[2].const_data_ptr<float>(),
                          .scale = saved[3].const_data_ptr<float>(),
                          .z = z.const_data_ptr<float>(),
                          .rho = saved[5].const_data_ptr<float>(),
                          .d_mixed = d_mixed.const_data_ptr(),
                          .d_post = d_post.const_data_ptr<float>(),
                          .d_comb = d_comb.const_data_ptr<float>(),
                          .d_streams = d_streams.mutable_data_ptr(),
                          .dz_rho = dz_rho.mutable_data_ptr<float>(),
                          .token_factors = factors.mutable_data_ptr<float>(),
                          .parts = parts.mutable_data_ptr<float>(),
                          .d_base_d_scale = sums.mutable_data_ptr<float>(),
                          .tokens = tokens,
                          .dim = dim,
                          .num_parts = num_parts,
                          .iters = static_cast<int>(context->saved_data["iters"].toInt()),
                          .hc_eps = static_cast<float>(context->saved_data["hc_eps"].toDouble()),
                          .type = element_type(streams)},
                         current_stream(streams));
    return {d_streams, fn_gradient(dz_rho, streams.flatten(1)), sums.narrow(0, 0, hc::kRows),
            sums.narrow(0, hc::kRows, 3), at::Tensor()};
  }
};

struct HcPostFunction : torch::autograd::Function<HcPostFunction> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& out_any,
                            const at::Tensor& streams_any,
                            const at::Tensor& post_any,
                            const at::Tensor& comb_any) {
    const at::Tensor out = kernel_input(out_any), streams = kernel_input(streams_any),
                     post = kernel_input(post_any), comb = kernel_input(comb_any);
    const at::Tensor result = at::empty_like(streams);
    hc_post_cuda({.out = out.const_data_ptr(),
                  .streams = streams.const_data_ptr(),
                  .post = post.const_data_ptr<float>(),
                  .comb = comb.const_data_ptr<float>(),
                  .result = result.mutable_data_ptr(),
                  .tokens = streams.size(0),
                  .dim = streams.size(2),
                  .type = element_type(streams)},
                 current_stream(streams));
    context->save_for_backward({out, streams, post, comb});
    return result;
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    const at::Tensor d_result = kernel_input(grad_outputs[0]);
    variable_list grads;
    for (const at::Tensor& input : saved) grads.push_back(at::empty_like(input));
    hc_post_backward_cuda({.out = saved[0].const_data_ptr(),
                           .streams = saved[1].const_data_ptr(),
                           .post = saved[2].const_data_ptr<float>(),
                           .comb = saved[3].const_data_ptr<float>(),
                           .d_result = d_result.const_data_ptr(),
                           .d_out = grads[0].mutable_data_ptr(),
                           .d_streams = grads[1].mutable_data_ptr(),
                           .d_post = grads[2].mutable_data_ptr<float>(),
                           .d_comb = grads[3].mutable_data_ptr<float>(),
                           .tokens = saved[1].size(0),
                           .dim = saved[1].size(2),
                           .type = element_type(saved[1])},
                          current_stream(saved[1]));
    return grads;
  }
};

HcPre run_pre_cuda(const at::Tensor& streams,
                   const at::Tensor& fn,
                   const at::Tensor& base,
                   const at::Tensor& scale,
                   const HcParams& params) {
  const variable_list out =
      HcPreFunction::apply(streams, float_input(fn), float_input(base), float_input(scale), params);
  return {.mixed = out[0], .post = out[1], .comb = out[2]};
}

bool learns(std::initializer_list<at::Tensor> inputs) {
  if (!at::GradMode::is_enabled()) return false;
  return std::any_of(inputs.begin(), inputs.end(),
                     [](const at::Tensor& x) { return x.requires_grad(); });
}

}  // namespace

HcPre hc_pre(const at::Tensor& streams,
             const at::Tensor& fn,
             const at::Tensor& base,
             const at::Tensor& scale,
             const HcParams& params) {
  check_shape(streams, {-1, -1, -1}, "hc_pre: streams");
  const int64_t n = streams.size(1), dim = streams.size(2);
  check_shape(fn, {(2 + n) * n, n * dim}, "hc_pre: fn");
  check_shape(base, {(2 + n) * n}, "hc_pre: base");
  check_shape(scale, {3}, "hc_pre: scale");
  if (serves_hc_sm90(streams) && reads_as_it_is(fn) && !learns({fn, base, scale}))
    return hc_pre_on_sm90(streams, fn, base, scale, params, /*head=*/false);
  refuse_as_hopper(streams, "hc_pre");
  if (use_pre_cuda(streams, params)) return run_pre_cuda(streams, fn, base, scale, params);
  if (use_kernel(streams)) {
    const auto kernel = [params](const auto& in) { return run_pre_cpu(in, params, false); };
    if (serves_hc_gradient(streams, params)) {
      const auto out = with_hc_pre_gradient(kernel, {streams, fn, base, scale}, params, false);
      return {.mixed = out[0], .post = out[1], .comb = out[2]};
    }
    const std::vector<at::Tensor> out = with_reference_gradient(
        kernel,
        [params](const auto& in) {
          const HcPre r = reference::hc_pre(in[0], in[1], in[2], in[3], params);
          return std::vector{r.mixed, r.post, r.comb};
        },
        {streams, fn, base, scale});
    return {.mixed = out[0], .post = out[1], .comb = out[2]};
  }
  return reference::hc_pre(streams, fn, base, scale, params);
}

HcInput hc_pre_normalised(const at::Tensor& streams,
                          const at::Tensor& fn,
                          const at::Tensor& base,
                          const at::Tensor& scale,
                          const HcParams& params,
                          const at::Tensor& norm,
                          Numerics numerics,
                          OperandKinds kinds,
                          SideBranch& comb_beside) {
  check_shape(streams, {-1, -1, -1}, "hc_pre: streams");
  const int64_t dim = streams.size(2);
  if (streams.is_cuda() && serves_hc_sm90(streams) &&
      serves_hc_pre_norm_sm90(streams.size(0), dim) &&
      serves_normalised_sm90(streams, dim, norm, numerics, kinds) && reads_as_it_is(fn) &&
      reads_as_it_is(base) && reads_as_it_is(scale) && reads_as_it_is(norm) &&
      !learns({fn, base, scale})) {
    check_shape(fn, {hc::kRows, hc::kStreams * dim}, "hc_pre: fn");
    check_shape(base, {hc::kRows}, "hc_pre: base");
    check_shape(scale, {3}, "hc_pre: scale");
    return hc_pre_norm_on_sm90(streams, fn, base, scale, params, norm, numerics, kinds,
                               comb_beside);
  }
  const auto mix = [params](const at::Tensor& x, const at::Tensor& f, const at::Tensor& b,
                            const at::Tensor& s) {
    HcPre pre = hc_pre(x, f, b, s, params);
    return std::array{std::move(pre.mixed), std::move(pre.post), std::move(pre.comb)};
  };
  const auto [mixed, post, comb] = recorded("mixed", mix, streams, fn, base, scale);
  return {.input = normalised_input(checkpointed(mixed), norm, params.norm_eps, numerics, kinds),
          .post = checkpointed(post),
          .comb = checkpointed(comb)};
}

at::Tensor hc_post(const at::Tensor& out,
                   const at::Tensor& streams,
                   const at::Tensor& post,
                   const at::Tensor& comb) {
  check_shape(streams, {-1, -1, -1}, "hc_post: streams");
  const int64_t tokens = streams.size(0), n = streams.size(1);
  check_shape(out, {tokens, streams.size(2)}, "hc_post: out");
  check_shape(post, {tokens, n}, "hc_post: post");
  check_shape(comb, {tokens, n, n}, "hc_post: comb");
  if (serves_hc_sm90(streams) && use_sm90(out) && !learns({post, comb}))
    return hc_post_on_sm90(out, streams, post, comb);
  refuse_as_hopper(streams, "hc_post");
  if (use_cuda(streams) && hc_post_cuda && hc_post_backward_cuda &&
      out.scalar_type() == streams.scalar_type()) {
    return HcPostFunction::apply(out, streams, post.to(at::kFloat), comb.to(at::kFloat));
  }
  if (use_kernel(streams)) {
    if (serves_hc_gradient(streams, {}))
      return with_hc_post_gradient(run_post_cpu, {out, streams, post, comb})[0];
    return with_reference_gradient(
        run_post_cpu,
        [](const auto& in) { return std::vector{reference::hc_post(in[0], in[1], in[2], in[3])}; },
        {out, streams, post, comb})[0];
  }
  return reference::hc_post(out, streams, post, comb);
}

at::Tensor hc_head(const at::Tensor& streams,
                   const at::Tensor& fn,
                   const at::Tensor& base,
                   const at::Tensor& scale,
                   const HcParams& params) {
  check_shape(streams, {-1, -1, -1}, "hc_head: streams");
  const int64_t n = streams.size(1);
  check_shape(fn, {n, n * streams.size(2)}, "hc_head: fn");
  check_shape(base, {n}, "hc_head: base");
  check_shape(scale, {1}, "hc_head: scale");
  if (serves_hc_sm90(streams) && reads_as_it_is(fn) && !learns({fn, base, scale}))
    return hc_pre_on_sm90(streams, fn, base, scale, params, /*head=*/true).mixed;
  refuse_as_hopper(streams, "hc_head");
  HcParams collapse = params;
  collapse.sinkhorn_iters = 1;
  if (use_pre_cuda(streams, collapse)) {
    // The kernel of hc_pre with zeros for the rows that the collapse has none of.
    const int64_t absent = hc::kRows - n;
    return run_pre_cuda(streams, at::constant_pad_nd(fn, {0, 0, 0, absent}),
                        at::constant_pad_nd(base, {0, absent}), at::constant_pad_nd(scale, {0, 2}),
                        collapse)
        .mixed;
  }
  if (use_kernel(streams)) {
    const auto kernel = [params](const auto& in) { return run_pre_cpu(in, params, true); };
    if (serves_hc_gradient(streams, collapse))
      return with_hc_pre_gradient(kernel, {streams, fn, base, scale}, params, true)[0];
    return with_reference_gradient(
        kernel,
        [params](const auto& in) {
          return std::vector{reference::hc_head(in[0], in[1], in[2], in[3], params)};
        },
        {streams, fn, base, scale})[0];
  }
  return reference::hc_head(streams, fn, base, scale, params);
}

}  // namespace hadal::ops
