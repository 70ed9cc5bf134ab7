#include "model/block.h"

#include <utility>

#include <ATen/ATen.h>

#include "ops/gemm/normalised_input.h"
#include "ops/norm/rms_norm.h"

namespace hadal::model {

ops::HcParams hc_params(const ModelConfig& config) {
  return {.sinkhorn_iters = config.hc_sinkhorn_iters,
          .norm_eps = config.norm_eps,
          .hc_eps = config.hc_eps};
}

BlockOutput block_forward(const Block& block,
                          const ModelConfig& config,
                          int64_t index,
                          at::Tensor streams,
                          const at::Tensor& ids,
                          const ops::RopeTable& compressed_rope,
                          const ForwardContext& context) {
  return block_around(
      block, config, index, std::move(streams), ids, context, [&](const ops::ProductInput& x) {
        return attention_forward(block.attn, config, index, x, compressed_rope, context);
      });
}

BlockOutput block_around(const Block& block,
                         const ModelConfig& config,
                         int64_t index,
                         at::Tensor streams,
                         const at::Tensor& ids,
                         const ForwardContext& context,
                         const Attend& attend) {
  const ops::HcParams params = hc_params(config);
  const ops::HcPre attn_mix = ops::hc_pre(streams, block.hc_attn.fn.value, block.hc_attn.base.value,
                                          block.hc_attn.scale.value, params);
  AttentionOutput attn =
      attend(ops::normalised_input(attn_mix.mixed, block.attn_norm.value, config.norm_eps,
                                   context.numerics, {.bf16 = block.attn.compressor.has_value()}));
  streams = ops::hc_post(attn.out, streams, attn_mix.post, attn_mix.comb);

  const ops::HcPre ffn_mix = ops::hc_pre(streams, block.hc_ffn.fn.value, block.hc_ffn.base.value,
                                         block.hc_ffn.scale.value, params);
  MoeOutput ffn = moe_forward(block.moe, config, index,
                              ops::normalised_input(ffn_mix.mixed, block.ffn_norm.value,
                                                    config.norm_eps, context.numerics, {}),
                              ids, context);
  streams = ops::hc_post(ffn.out, streams, ffn_mix.post, ffn_mix.comb);
  return {.streams = std::move(streams),
          .aux = {.attn = std::move(attn.aux), .moe = std::move(ffn.aux)}};
}

at::Tensor collapse(const at::Tensor& streams,
                    const HyperConnection& head,
                    const Parameter& norm,
                    const ModelConfig& config) {
  return ops::rms_norm(
      ops::hc_head(streams, head.fn.value, head.base.value, head.scale.value, hc_params(config)),
      norm.value, config.norm_eps);
}

}  // namespace hadal::model
