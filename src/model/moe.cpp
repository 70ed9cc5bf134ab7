#include "model/moe.h"

#include <utility>

#include <ATen/ATen.h>

#include "ops/moe/permute.h"
#include "ops/moe/sm90_experts.h"
#include "ops/moe/swiglu.h"
#include "ops/rows/gather.h"
#include "ops/tape.h"

namespace hadal::model {

using ops::GemmRole;

namespace {

at::Tensor gated(const at::Tensor& gate,
                 const at::Tensor& up,
                 const at::Tensor& weight,
                 double limit) {
  const auto act = [limit](const at::Tensor& g, const at::Tensor& u, const at::Tensor& w) {
    return ops::swiglu(g, u, w, limit);
  };
  return ops::checkpointed(ops::recorded("hidden", act, gate, up, weight));
}

/// `forced`: experts of every token, or undefined.
ops::GateInput gate_input(const Moe& moe,
                          const ModelConfig& config,
                          const at::Tensor& logits,
                          const at::Tensor& forced,
                          const at::Tensor& token_ids) {
  ops::GateInput in;
  in.logits = logits;
  in.topk = config.n_activated_experts;
  in.route_scale = config.route_scale;
  if (forced.defined()) {
    in.table = forced;
  } else if (moe.tid2eid) {
    in.table = moe.tid2eid->value;
    in.ids = token_ids;
  } else {
    in.bias = moe.gate_bias->value;
  }
  return in;
}

/// The experts' product and what it needs as one chain of kernels.
ops::RoutedExperts chain_of(const Parameter& w1,
                            const Parameter& w3,
                            const Parameter& w2,
                            const ModelConfig& config) {
  return {.w1 = w1.weight, .w3 = w3.weight, .w2 = w2.weight, .swiglu_limit = config.swiglu_limit};
}

}  // namespace

MoeOutput moe_forward(const Moe& moe,
                      const ModelConfig& config,
                      int64_t block,
                      const ops::ProductInput& input,
                      const at::Tensor& token_ids,
                      const ForwardContext& context) {
  const ops::Numerics numerics = context.numerics;
  const at::Tensor& x = input.x();
  MoeAux aux;
  const auto swiglu = [&](const at::Tensor& gate, const at::Tensor& up, const at::Tensor& weight) {
    if (context.request.swiglu) aux.swiglu.push_back({.gate = gate.detach(), .up = up.detach()});
    return gated(gate, up, weight, config.swiglu_limit);
  };
  const auto shared_expert = [&] {
    const at::Tensor hidden = swiglu(apply_linear(moe.shared_w1, input),
                                     apply_linear(moe.shared_w3, input), at::Tensor());
    return apply_linear(moe.shared_w2, ops::ProductInput(hidden, numerics));
  };
  const ops::RoutedExperts experts = chain_of(moe.w1, moe.w3, moe.w2, config);
  const bool on_sm90 = !context.request.swiglu && ops::serves_experts_sm90(x, experts, numerics);
  // Nobody waits for the shared expert before the sum over a token's experts.
  ops::SideBranch beside(0);
  at::Tensor shared;
  if (on_sm90) {
    // The kernels round rows of x as they gather them, and of the shared expert as they multiply.
    const ops::RoutedExperts of_all = chain_of(moe.shared_w1, moe.shared_w3, moe.shared_w2, config);
    make_operands({&moe.shared_w1, &moe.gate}, input);
    beside.run([&] {
      shared = ops::serves_shared_expert_sm90(input, of_all)
                   ? ops::shared_expert_on_sm90(input, of_all)
                   : shared_expert();
    });
  }
  const at::Tensor logits = apply_linear(moe.gate, input);  // [tokens, experts]
  at::Tensor fixed = context.forced_of(block).experts;
  if (on_sm90 && !context.request.routing) {
    const ops::GateInput gate = gate_input(moe, config, logits, fixed, token_ids);
    if (ops::serves_gate_route_sm90(gate)) {
      ops::Routing routing;
      const ops::ExpertRoute route = ops::gate_and_route_sm90(gate, routing);
      if (context.request.experts) aux.routing.experts = routing.experts.to(at::kLong);
      return {.out = ops::experts_on_sm90(x, route, experts, shared, beside),
              .aux = std::move(aux)};
    }
  }
  if (!fixed.defined() && moe.tid2eid) fixed = moe.tid2eid->value.index_select(0, token_ids);
  const ops::Routing routing =
      fixed.defined() ? ops::gate_fixed(logits, fixed, config.route_scale, numerics)
                      : ops::gate(logits, moe.gate_bias->value, config.n_activated_experts,
                                  config.route_scale, numerics);
  if (context.request.experts || context.request.routing)
    aux.routing.experts = routing.experts.to(at::kLong);
  if (context.request.routing) {
    aux.routing.weights = routing.weights.detach();
    aux.routing.affinity = routing.affinity;
  }

  if (on_sm90)
    return {.out = ops::experts_on_sm90(x, ops::route_on_sm90(routing, config.n_routed_experts),
                                        experts, shared, beside),
            .aux = std::move(aux)};

  const ops::Permutation order =
      ops::permute_by_expert(routing.experts.to(at::kLong), config.n_routed_experts);
  const auto sort_rows = [order](const at::Tensor& in) { return ops::permute_rows(in, order); };
  const at::Tensor rows = ops::checkpointed(
      ops::recorded("expert rows", sort_rows, input.rounded(GemmRole::kFp4)));  // [pairs, dim]
  const at::Tensor weights =
      ops::gather_distinct_rows(routing.weights.flatten(), order.slot);  // [pairs]
  const at::Tensor hidden = swiglu(apply_experts(moe.w1, rows, order, numerics),
                                   apply_experts(moe.w3, rows, order, numerics), weights);
  const at::Tensor routed = apply_experts(
      moe.w2, ops::ProductInput(hidden, numerics).rounded(GemmRole::kFp4), order, numerics);
  const auto add = [order](const at::Tensor& pairs, const at::Tensor& of_all) {
    return ops::combine(pairs, order, of_all);
  };
  return {.out = ops::checkpointed(ops::recorded("combined", add, routed, shared_expert())),
          .aux = std::move(aux)};
}

}  // namespace hadal::model
