#include "model/recompute.h"

#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/check.h"
#include "model/describe.h"
#include "ops/sm90.h"

namespace hadal::model {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// One block of one pass, from its first run to its second.
struct Call : torch::CustomClassHolder {
  const Block& block;
  const ModelConfig& config;
  int64_t index;
  at::Tensor ids;
  const ops::RopeTable& compressed_rope;
  ops::Batch batch;        ///< shares the plan of the caller's
  ForwardContext context;  ///< of the first run, then of the second
  AuxRequest asked;
  BlockAux aux;  ///< of the first run

  Call(const Block& block_in,
       const ModelConfig& config_in,
       int64_t index_in,
       const at::Tensor& ids_in,
       const ops::RopeTable& rope,
       const ForwardContext& context_in)
      : block(block_in),
        config(config_in),
        index(index_in),
        ids(ids_in),
        compressed_rope(rope),
        batch(*context_in.batch),
        context(context_in),
        asked(context_in.request) {
    context.batch = &batch;
  }

  BlockOutput run(const at::Tensor& streams) const {
    return block_forward(block, config, index, streams, ids, compressed_rope, context);
  }
};

/// What gradients come back through: streams, affinities, the indexer's loss, the latter two where
/// asked for.
variable_list differentiable(const at::Tensor& streams, const BlockAux& aux) {
  variable_list list{streams};
  if (aux.moe.routing.affinity.defined()) list.push_back(aux.moe.routing.affinity);
  if (aux.attn.index_loss.sum.defined()) list.push_back(aux.attn.index_loss.sum);
  return list;
}

struct RecomputedBlock : torch::autograd::Function<RecomputedBlock> {
  /// inputs: the streams and every parameter that gradients move.
  static variable_list forward(AutogradContext* context,
                               const c10::intrusive_ptr<Call>& call,
                               const at::TensorList& inputs) {
    call->context.request.experts = call->context.request.selection = true;
    const ops::DifferentiableGuard as_the_second_run;
    BlockOutput first = call->run(inputs[0]);
    // The second run is asked for what has gradients alone, and makes the first one's choices.
    std::vector<BlockChoices>& forced = call->context.forced;
    forced.assign(static_cast<size_t>(call->index) + 1, {});
    forced.back() = {.experts = first.aux.moe.routing.experts,
                     .selection = first.aux.attn.selection};
    call->context.request = {.routing = call->asked.routing, .index_loss = call->asked.index_loss};
    if (!call->asked.experts && !call->asked.routing) first.aux.moe.routing.experts = at::Tensor();
    if (!call->asked.selection) first.aux.attn.selection = at::Tensor();
    call->aux = std::move(first.aux);
    context->save_for_backward(inputs.vec());
    context->saved_data["call"] = c10::IValue::make_capsule(call);
    context->set_materialize_grads(false);  // undefined: nobody differentiates this output
    return differentiable(first.streams, call->aux);
  }

  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const auto call =
        c10::static_intrusive_pointer_cast<Call>(context->saved_data["call"].toCapsule());
    const variable_list saved = context->get_saved_variables();
    variable_list grads(1 + saved.size());  // the call takes the first place
    bool wanted = false;
    for (const at::Tensor& grad : grad_outputs) wanted |= grad.defined();
    if (!wanted) return grads;

    const at::AutoGradMode enable_grad(true);
    const at::Tensor streams = saved[0].detach().requires_grad_(saved[0].requires_grad());
    const ops::DifferentiableGuard as_the_first_run;  // also where a part has no gradient
    const BlockOutput second = call->run(streams);
    const variable_list outputs = differentiable(second.streams, second.aux);
    variable_list roots, root_grads, inputs;
    std::vector<size_t> places;
    for (size_t i = 0; i < outputs.size(); ++i) {
      if (!grad_outputs[i].defined() || !outputs[i].requires_grad()) continue;
      roots.push_back(outputs[i]);
      root_grads.push_back(grad_outputs[i]);
    }
    if (roots.empty()) return grads;
    for (size_t i = 0; i < saved.size(); ++i) {
      const at::Tensor& input = i == 0 ? streams : saved[i];
      if (!input.requires_grad()) continue;
      inputs.push_back(input);
      places.push_back(1 + i);
    }
    const variable_list computed = torch::autograd::grad(roots, inputs, root_grads,
                                                         /*retain_graph=*/std::nullopt,
                                                         /*create_graph=*/false,
                                                         /*allow_unused=*/true);
    for (size_t i = 0; i < places.size(); ++i) grads[places[i]] = computed[i];
    return grads;
  }
};

}  // namespace

BlockOutput run_block(const Block& block,
                      const ModelConfig& config,
                      int64_t index,
                      at::Tensor streams,
                      const at::Tensor& ids,
                      const ops::RopeTable& compressed_rope,
                      const ForwardContext& context) {
  // Nobody else holds the streams then: the block frees them as it goes.
  const auto plain = [&] {
    return block_forward(block, config, index, std::move(streams), ids, compressed_rope, context);
  };
  if (!context.recompute || !at::GradMode::is_enabled()) return plain();
  struct Leaves final : FieldVisitor {
    std::vector<at::Tensor> values;
    void field(Parameter& parameter, const Field&) override {
      if (parameter.value.defined() && parameter.value.requires_grad())
        values.push_back(parameter.value);
    }
  } leaves;
  // Visiting does not change a block that has its parameters.
  describe(config, index, const_cast<Block&>(block), leaves);
  if (!streams.requires_grad() && leaves.values.empty()) return plain();
  std::vector<at::Tensor> inputs{std::move(streams)};
  inputs.insert(inputs.end(), leaves.values.begin(), leaves.values.end());
  HADAL_CHECK(context.kv == nullptr, "recompute: block ", index, " writes to a cache");
  const auto call = c10::make_intrusive<Call>(block, config, index, ids, compressed_rope, context);
  variable_list outputs = RecomputedBlock::apply(call, at::TensorList(inputs));
  BlockOutput output{.streams = outputs[0], .aux = std::move(call->aux)};
  size_t next = 1;
  if (output.aux.moe.routing.affinity.defined()) output.aux.moe.routing.affinity = outputs[next++];
  if (output.aux.attn.index_loss.sum.defined()) output.aux.attn.index_loss.sum = outputs[next++];
  return output;
}

}  // namespace hadal::model
