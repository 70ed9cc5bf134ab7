#include "ops/moe/balance.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ops/gemm/trained_product.h"
#include "ops/op.h"

namespace hadal::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct BalanceLoss : torch::autograd::Function<BalanceLoss> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& share,
                            const at::Tensor& sums,
                            const at::Tensor& f,
                            int64_t row_length) {
    context->save_for_backward({f});
    context->set_materialize_grads(false);
    context->saved_data["tokens"] = share.size(0);
    context->saved_data["row_length"] = row_length;
    return (f * (sums / static_cast<double>(row_length))).sum();
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    if (!grad_outputs[0].defined()) return variable_list(4);
    const at::Tensor f = context->get_saved_variables()[0];
    const auto length = static_cast<double>(context->saved_data["row_length"].toInt());
    const at::Tensor each = f * grad_outputs[0] / length;
    return {
        each.unsqueeze(0).expand({context->saved_data["tokens"].toInt(), f.size(0)}), {}, {}, {}};
  }
};

}  // namespace

at::Tensor share_sums(const at::Tensor& share) {
  const at::NoGradGuard no_grad;
  return weight_gradient(share, at::ones({share.size(0), 1}, share.options())).flatten();
}

at::Tensor balance_loss(const at::Tensor& share,
                        const at::Tensor& sums,
                        const at::Tensor& chosen,
                        int64_t row_length,
                        int64_t topk) {
  const int64_t experts = share.size(1);
  check_shape(sums, {experts}, "balance_loss: sums");
  check_shape(chosen, {experts}, "balance_loss: chosen");
  const at::Tensor f = chosen.to(share.scalar_type()) *
                       (static_cast<double>(experts) / static_cast<double>(topk * row_length));
  return BalanceLoss::apply(share, sums, f, row_length);
}

}  // namespace hadal::ops
