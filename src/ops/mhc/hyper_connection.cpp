#include "ops/mhc/hyper_connection.h"

#include <ATen/ATen.h>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/mhc/hyper_connection_cpu.h"
#include "ops/op.h"

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
  if (use_kernel(streams)) {
    const std::vector<at::Tensor> out = with_reference_gradient(
        [params](const auto& in) { return run_pre_cpu(in, params, false); },
        [params](const auto& in) {
          const HcPre r = reference::hc_pre(in[0], in[1], in[2], in[3], params);
          return std::vector{r.mixed, r.post, r.comb};
        },
        {streams, fn, base, scale});
    return {.mixed = out[0], .post = out[1], .comb = out[2]};
  }
  return reference::hc_pre(streams, fn, base, scale, params);
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
  if (use_kernel(streams)) {
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
  if (use_kernel(streams)) {
    return with_reference_gradient(
        [params](const auto& in) { return run_pre_cpu(in, params, true); },
        [params](const auto& in) {
          return std::vector{reference::hc_head(in[0], in[1], in[2], in[3], params)};
        },
        {streams, fn, base, scale})[0];
  }
  return reference::hc_head(streams, fn, base, scale, params);
}

}  // namespace hadal::ops
