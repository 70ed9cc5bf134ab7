#include "model/block.h"

#include <utility>

#include <ATen/ATen.h>

#include "ops/norm/rms_norm.h"
#include "ops/tape.h"

namespace hadal::model {
namespace {

using ops::checkpointed;
using ops::recorded;

at::Tensor mix_out(const at::Tensor& out, const at::Tensor& streams, const ops::HcInput& mix) {
  return checkpointed(recorded("streams", ops::hc_post, out, streams, mix.post, mix.comb));
}

}  // namespace

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
  if (ops::Tape* const tape = ops::Tape::recording()) tape->enter_block(index);
  const ops::HcParams params = hc_params(config);
  const auto enter = [&](const HyperConnection& hc, const Parameter& norm, ops::OperandKinds kinds,
                         ops::SideBranch& comb_beside) {
    return ops::hc_pre_normalised(streams, hc.fn.value, hc.base.value, hc.scale.value, params,
                                  norm.values_in(context.numerics), context.numerics, kinds,
                                  comb_beside);
  };
  // What carries the streams past a sub-layer is made beside it.
  ops::SideBranch attn_comb(1), ffn_comb(1);
  const ops::HcInput attn_mix =
      enter(block.hc_attn, block.attn_norm, {.bf16 = block.attn.compressor.has_value()}, attn_comb);
  AttentionOutput attn = attend(attn_mix.input);
  attn_comb.join();
  streams = mix_out(attn.out, streams, attn_mix);

  const ops::HcInput ffn_mix = enter(block.hc_ffn, block.ffn_norm, {}, ffn_comb);
  MoeOutput ffn = moe_forward(block.moe, config, index, ffn_mix.input, ids, context);
  ffn_comb.join();
  streams = mix_out(ffn.out, streams, ffn_mix);
  return {.streams = std::move(streams),
          .aux = {.attn = std::move(attn.aux), .moe = std::move(ffn.aux)}};
}

at::Tensor collapse(const at::Tensor& streams,
                    const HyperConnection& head,
                    const Parameter& norm,
                    const ModelConfig& config,
                    ops::Numerics numerics) {
  const auto mix = [params = hc_params(config)](const at::Tensor& x, const at::Tensor& fn,
                                                const at::Tensor& base, const at::Tensor& scale) {
    return ops::hc_head(x, fn, base, scale, params);
  };
  const at::Tensor mixed = checkpointed(
      recorded("mixed", mix, streams, head.fn.value, head.base.value, head.scale.value));
  const auto normalise = [eps = config.norm_eps](const at::Tensor& x, const at::Tensor& weight) {
    return ops::rms_norm(x, weight, eps);
  };
  return checkpointed(recorded("norm", normalise, mixed, norm.values_in(numerics)));
}

}  // namespace hadal::model
