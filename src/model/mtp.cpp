#include "model/mtp.h"

#include <utility>

#include <ATen/ATen.h>

#include "model/recompute.h"
#include "ops/norm/rms_norm.h"

namespace hadal::model {

using ops::GemmRole;

MtpOutput mtp_forward(const Mtp& mtp,
                      const ModelConfig& config,
                      const at::Tensor& rows,
                      const at::Tensor& streams,
                      const at::Tensor& next_ids,
                      const ops::RopeTable& compressed_rope,
                      const ForwardContext& context) {
  const ops::Numerics numerics = context.numerics;
  const int64_t tokens = streams.size(0), n = config.hc_mult, dim = config.dim;
  const at::Tensor e = ops::rms_norm(rows, mtp.enorm.values_in(numerics), config.norm_eps);
  const at::Tensor h = ops::rms_norm(streams, mtp.hnorm.values_in(numerics), config.norm_eps)
                           .reshape({tokens * n, dim});
  const at::Tensor projected_e =
      apply_linear(mtp.e_proj, ops::quantise_input(e, GemmRole::kFp8, numerics), numerics);
  const at::Tensor projected_h =
      apply_linear(mtp.h_proj, ops::quantise_input(h, GemmRole::kFp8, numerics), numerics);
  at::Tensor z = projected_e.unsqueeze(1) + projected_h.reshape({tokens, n, dim});
  BlockOutput block = run_block(mtp.block, config, config.n_layers, std::move(z), next_ids,
                                compressed_rope, context);
  return {.head_input = collapse(block.streams, mtp.hc_head, mtp.norm, config, numerics),
          .aux = std::move(block.aux)};
}

}  // namespace hadal::model
