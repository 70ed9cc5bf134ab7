#include "ops/loss/cross_entropy.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/op.h"

namespace hadal::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& hidden,
                            const at::Tensor& head,
                            const at::Tensor& targets,
                            int64_t chunk) {
    const at::ScalarType type = compute_type(hidden);
    const at::Tensor weight = head.to(type);
    at::Tensor loss = at::zeros({}, hidden.options().dtype(type));
    at::Tensor grad_hidden = at::empty(hidden.sizes(), hidden.options().dtype(type));
    at::Tensor grad_head = at::zeros(head.sizes(), head.options().dtype(type));
    for (int64_t begin = 0; begin < hidden.size(0); begin += chunk) {
      const int64_t count = std::min(chunk, hidden.size(0) - begin);
      const at::Tensor h = hidden.narrow(0, begin, count).to(type);
      const at::Tensor target = targets.narrow(0, begin, count);
      const at::Tensor scored = (target >= 0).to(type).unsqueeze(1);
      const at::Tensor safe = target.clamp_min(0).unsqueeze(1);
      at::Tensor log_p = at::log_softmax(at::linear(h, weight), 1);
      loss -= (log_p.gather(1, safe) * scored).sum();
      at::Tensor grad = log_p.exp_();  // softmax - one-hot, for scored tokens
      grad.scatter_add_(1, safe, at::full_like(safe, -1, grad.options()));
      grad *= scored;
      grad_hidden.narrow(0, begin, count).copy_(at::mm(grad, weight));
      grad_head.addmm_(grad.t(), h);
    }
    context->save_for_backward(
        {grad_hidden.to(hidden.scalar_type()), grad_head.to(head.scalar_type())});
    return loss;
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    return {saved[0] * grad_outputs[0], saved[1] * grad_outputs[0], at::Tensor(), at::Tensor()};
  }
};

}  // namespace

namespace reference {

at::Tensor linear_cross_entropy(const at::Tensor& hidden,
                                const at::Tensor& head,
                                const at::Tensor& targets) {
  const at::ScalarType type = compute_type(hidden);
  const at::Tensor log_p = at::log_softmax(at::linear(hidden.to(type), head.to(type)), 1);
  const at::Tensor scored = (targets >= 0).to(type);
  return -(log_p.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1) * scored).sum();
}

}  // namespace reference

at::Tensor linear_cross_entropy(const at::Tensor& hidden,
                                const at::Tensor& head,
                                const at::Tensor& targets,
                                int64_t chunk) {
  check_shape(hidden, {-1, -1}, "linear_cross_entropy: hidden");
  check_shape(head, {-1, hidden.size(1)}, "linear_cross_entropy: head");
  check_shape(targets, {hidden.size(0)}, "linear_cross_entropy: targets");
  if (reference_forced()) return reference::linear_cross_entropy(hidden, head, targets);
  return LinearCrossEntropy::apply(hidden, head, targets, chunk);
}

}  // namespace hadal::ops
