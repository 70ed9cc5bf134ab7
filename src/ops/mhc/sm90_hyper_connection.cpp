#include "ops/mhc/sm90_hyper_connection.h"

#include <utility>

#include <ATen/ATen.h>

#include "ops/mhc/hc_math.h"
#include "ops/mhc/hyper_connection_sm90.h"
#include "ops/op.h"
#include "ops/sm90.h"

namespace hadal::ops {

/// Four streams whose widths the Hopper kernels take.
bool serves_hc_sm90(const at::Tensor& streams) {
  return streams.size(1) == hc::kStreams && streams.size(2) % 128 == 0 && use_sm90(streams);
}

/// A kernel that reads a constant while the kernel before it still runs must be given the tensor
/// itself: a copy might be what that kernel makes.
bool reads_as_it_is(const at::Tensor& constant) {
  return constant.scalar_type() == at::kFloat &&
         (constant.is_cpu() ? constant.is_contiguous() : constant.is_same(kernel_input(constant)));
}

/// hc_pre, or the collapse (head), with the bits of run_pre_cpu.
HcPre hc_pre_on_sm90(const at::Tensor& streams_any,
                     const at::Tensor& fn,
                     const at::Tensor& base_any,
                     const at::Tensor& scale_any,
                     const HcParams& params,
                     bool head) {
  const at::Tensor streams = kernel_input(streams_any), base = fp32_input(base_any),
                   scale = fp32_input(scale_any);
  const int64_t tokens = streams.size(0), dim = streams.size(2);
  HcPre result{.mixed = at::empty({tokens, dim}, streams.options()), .post = {}, .comb = {}};
  if (!head) {
    result.post = at::empty({tokens, hc::kStreams}, fn.options());
    result.comb = at::empty({tokens, hc::kStreams, hc::kStreams}, fn.options());
  }
  run_sm90(streams, hc_pre_sm90, hc_pre_twin,
           {.streams = streams.const_data_ptr(),
            .fn = fn.const_data_ptr<float>(),
            .base = base.const_data_ptr<float>(),
            .scale = scale.const_data_ptr<float>(),
            .mixed = result.mixed.mutable_data_ptr(),
            .post = head ? nullptr : result.post.mutable_data_ptr<float>(),
            .comb = head ? nullptr : result.comb.mutable_data_ptr<float>(),
            .tokens = tokens,
            .dim = dim,
            .sinkhorn_iters = static_cast<int>(params.sinkhorn_iters),
            .norm_eps = static_cast<float>(params.norm_eps),
            .hc_eps = static_cast<float>(params.hc_eps),
            .head = head});
  return result;
}

/// hc_pre and the norm behind it in one launch.
HcInput hc_pre_norm_on_sm90(const at::Tensor& streams_any,
                            const at::Tensor& fn,
                            const at::Tensor& base_any,
                            const at::Tensor& scale_any,
                            const HcParams& params,
                            const at::Tensor& norm,
                            Numerics numerics,
                            OperandKinds kinds,
                            SideBranch& comb_beside) {
  const at::Tensor streams = kernel_input(streams_any), base = fp32_input(base_any),
                   scale = fp32_input(scale_any);
  const int64_t tokens = streams.size(0), dim = streams.size(2);
  NormalisedRows rows(streams, norm, params.norm_eps, numerics, kinds);
  const at::Tensor post = at::empty({tokens, hc::kStreams}, fn.options()),
                   comb = at::empty({tokens, hc::kStreams, hc::kStreams}, fn.options());
  hc_pre_norm_sm90({.pre = {.streams = streams.const_data_ptr(),
                            .fn = fn.const_data_ptr<float>(),
                            .base = base.const_data_ptr<float>(),
                            .scale = scale.const_data_ptr<float>(),
                            .mixed = nullptr,
                            .post = post.mutable_data_ptr<float>(),
                            .comb = comb.mutable_data_ptr<float>(),
                            .tokens = tokens,
                            .dim = dim,
                            .sinkhorn_iters = static_cast<int>(params.sinkhorn_iters),
                            .norm_eps = static_cast<float>(params.norm_eps),
                            .hc_eps = static_cast<float>(params.hc_eps),
                            .head = false},
                    .norm = rows.params},
                   current_stream(streams));
  comb_beside.run([&] {
    hc_comb_sm90({.comb = comb.mutable_data_ptr<float>(),
                  .tokens = tokens,
                  .iters = static_cast<int>(params.sinkhorn_iters),
                  .eps = static_cast<float>(params.hc_eps)},
                 current_stream(streams));
  });
  return {.input = std::move(rows).input(numerics), .post = post, .comb = comb};
}

at::Tensor hc_post_on_sm90(const at::Tensor& out_any,
                           const at::Tensor& streams_any,
                           const at::Tensor& post_any,
                           const at::Tensor& comb_any) {
  const at::Tensor out = kernel_input(out_any), streams = kernel_input(streams_any),
                   post = fp32_input(post_any), comb = fp32_input(comb_any);
  at::Tensor result = at::empty_like(streams);
  run_sm90(streams, hc_post_sm90, hc_post_twin,
           {.out = out.const_data_ptr(),
            .streams = streams.const_data_ptr(),
            .post = post.const_data_ptr<float>(),
            .comb = comb.const_data_ptr<float>(),
            .result = result.mutable_data_ptr(),
            .tokens = streams.size(0),
            .dim = streams.size(2)});
  return result;
}

}  // namespace hadal::ops
