#include "train/token_loss.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/loss/cross_entropy.h"

namespace hadal::train {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// Tokens whose logits are held at a time.
constexpr int64_t kLossChunk = 4096;

HeadUse* use_of(AutogradContext* context) {
  return reinterpret_cast<HeadUse*>(context->saved_data["use"].toInt());
}

/// x, for whose backward pass the context knows the use.
at::Tensor with_use(AutogradContext* context, const at::Tensor& x, HeadUse* use) {
  context->saved_data["use"] = reinterpret_cast<int64_t>(use);
  context->set_materialize_grads(false);
  return x.view_as(x);
}

/// x; keeps its gradient as the factor and passes on a one.
struct KeepFactor : torch::autograd::Function<KeepFactor> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, HeadUse* use) {
    return with_use(context, x, use);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    if (!grads[0].defined()) return variable_list(2);
    use_of(context)->factor = grads[0];
    return {at::ones_like(grads[0]), at::Tensor()};
  }
};

/// x; multiplies its gradient by the factor that KeepFactor met.
struct ApplyFactor : torch::autograd::Function<ApplyFactor> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, HeadUse* use) {
    return with_use(context, x, use);
  }
  static variable_list backward(AutogradContext* context, variable_list grads) {
    if (!grads[0].defined()) return variable_list(2);
    return {grads[0] * use_of(context)->factor, at::Tensor()};
  }
};

}  // namespace

at::Tensor leaf_of_parameter(const at::Tensor& value) {
  at::Tensor leaf = value.detach();
  leaf.requires_grad_(value.requires_grad());
  if (leaf.scalar_type() == at::kBFloat16 && leaf.requires_grad()) leaf.set_grad_dtype(at::kFloat);
  return leaf;
}

at::Tensor token_loss(const model::Transformer& model,
                      const at::Tensor& head,
                      const at::Tensor& hidden,
                      const at::Tensor& targets,
                      HeadUse* use) {
  if (use == nullptr)
    return ops::linear_cross_entropy(hidden, head, targets, kLossChunk, model.head_master());
  use->leaf = leaf_of_parameter(model.head_master());
  return KeepFactor::apply(ops::linear_cross_entropy(ApplyFactor::apply(hidden, use), head.detach(),
                                                     targets, kLossChunk, use->leaf),
                           use);
}

}  // namespace hadal::train
