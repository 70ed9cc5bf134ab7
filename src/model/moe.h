// Mixture of experts of one block: hash or learned routing, routed experts, one shared expert
// (model.md 11).
#pragma once

#include <optional>

#include <ATen/core/Tensor.h>

#include "model/config.h"
#include "model/context.h"
#include "model/parameter.h"

namespace hadal::model {

struct Moe {
  Parameter gate;                      ///< [experts, dim]
  std::optional<Parameter> gate_bias;  ///< learned routing only
  std::optional<Parameter> tid2eid;    ///< hashed routing only
  Parameter w1, w3, w2;                ///< routed experts, stacked
  Parameter shared_w1, shared_w3, shared_w2;
};

struct MoeOutput {
  at::Tensor out;  ///< [tokens, dim]
  MoeAux aux;
};

/// The experts are the forced ones of the context, else hashed or learned.
/// x [tokens, dim] after ffn_norm, token_ids [tokens] I64 of the tokens whose states are routed ->
/// [tokens, dim].
MoeOutput moe_forward(const Moe& moe,
                      const ModelConfig& config,
                      int64_t block,
                      const ops::ProductInput& x,
                      const at::Tensor& token_ids,
                      const ForwardContext& context);

}  // namespace hadal::model
