#include "ops/loss/cross_entropy.h"

#include <algorithm>
#include <bit>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "base/parallel.h"
#include "ops/gemm/trained_product.h"
#include "ops/loss/cross_entropy_cpu.h"
#include "ops/loss/cross_entropy_kernels.h"
#include "ops/op.h"
#include "ops/tensor_sums.h"

namespace hadal::ops {

constinit KernelSlot<void(const CrossEntropyParams&, Stream)> cross_entropy_cuda;

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

bool use_cuda(const at::Tensor& hidden, const at::Tensor& head) {
  return use_cuda_kernel(hidden) && cross_entropy_cuda && hidden.scalar_type() == at::kBFloat16 &&
         head.scalar_type() == at::kBFloat16 && head.size(0) % 4 == 0;
}

/// BF16 operands: FP32 logits out of the library's GEMM, then one kernel for the loss and the
/// logits' gradient in BF16, whose two products with head and hidden follow at once. The head's
/// gradient adds up over chunks in FP32, in order.
struct LinearCrossEntropyCuda : torch::autograd::Function<LinearCrossEntropyCuda> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& hidden_any,
                            const at::Tensor& head_any,
                            const at::Tensor& targets_any,
                            int64_t chunk,
                            bool with_gradients) {
    const at::Tensor hidden = hidden_any.contiguous(), head = head_any.contiguous(),
                     targets = targets_any.to(at::kLong).contiguous();
    const int64_t tokens = hidden.size(0), vocab = head.size(0);
    const at::Tensor loss = at::empty({tokens}, hidden.options().dtype(at::kFloat));
    at::Tensor grad_hidden, grad_head;
    if (with_gradients) grad_hidden = at::empty_like(hidden);
    for (int64_t begin = 0; begin < tokens; begin += chunk) {
      const int64_t count = std::min(chunk, tokens - begin);
      const at::Tensor h = hidden.narrow(0, begin, count);
      const at::Tensor logits = at::mm(h, head.t(), at::kFloat);
      at::Tensor grad;
      if (with_gradients) grad = at::empty({count, vocab}, hidden.options());
      cross_entropy_cuda({.logits = logits.const_data_ptr<float>(),
                          .targets = targets.const_data_ptr<int64_t>() + begin,
                          .loss = loss.mutable_data_ptr<float>() + begin,
                          .grad = with_gradients ? grad.mutable_data_ptr() : nullptr,
                          .rows = count,
                          .vocab = vocab},
                         current_stream(hidden));
      if (!with_gradients) continue;
      at::Tensor rows = grad_hidden.narrow(0, begin, count);
      at::mm_out(rows, grad, head);
      const at::Tensor share = at::mm(grad.t(), h, at::kFloat);
      grad_head = grad_head.defined() ? grad_head.add_(share) : share;
    }
    if (with_gradients) context->save_for_backward({grad_hidden, grad_head.to(head.scalar_type())});
    return loss.sum();
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    const variable_list saved = context->get_saved_variables();
    return {saved[0] * grad_outputs[0], saved[1] * grad_outputs[0], at::Tensor(), at::Tensor(),
            at::Tensor()};
  }
};

/// FP32 or BF16 operands on the CPU: products by the matrix kernel, the logits' gradient in the
/// hidden states' type, sums over tokens by their tree.
struct LinearCrossEntropyCpu : torch::autograd::Function<LinearCrossEntropyCpu> {
  static at::Tensor forward(AutogradContext* context,
                            const at::Tensor& hidden_any,
                            const at::Tensor& master,
                            const at::Tensor& head,
                            const at::Tensor& targets_any,
                            int64_t chunk,
                            bool with_gradients) {
    const at::Tensor hidden = hidden_any.contiguous(),
                     targets = targets_any.to(at::kLong).contiguous();
    const int64_t tokens = hidden.size(0), vocab = head.size(0);
    const Panels panels = pack_panels(head);
    Panels transposed;
    if (with_gradients) transposed = pack_panels(head.t().contiguous());
    const at::Tensor loss = at::empty({tokens}, hidden.options().dtype(at::kFloat));
    at::Tensor grad_hidden;
    if (with_gradients) grad_hidden = at::empty_like(hidden);
    TensorSums grad_head;
    // Whole subtrees of chunks at a time.
    const int64_t piece =
        std::max(kSumChunk, static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(chunk))));
    for (int64_t begin = 0; begin < tokens; begin += piece) {
      const int64_t count = std::min(piece, tokens - begin);
      const at::Tensor h = hidden.narrow(0, begin, count);
      const at::Tensor logits = linear(h, panels, GemmRole::kFp32);
      at::Tensor grad;
      if (with_gradients) grad = at::empty({count, vocab}, hidden.options());
      const CrossEntropyCpuParams params{.logits = logits.const_data_ptr<float>(),
                                         .targets = targets.const_data_ptr<int64_t>() + begin,
                                         .loss = loss.mutable_data_ptr<float>() + begin,
                                         .grad = with_gradients ? grad.mutable_data_ptr() : nullptr,
                                         .vocab = vocab,
                                         .grad_type = element_type(hidden)};
      parallel_for(count, 4,
                   [&](int64_t from, int64_t to) { cross_entropy_cpu(params, from, to); });
      if (!with_gradients) continue;
      grad_hidden.narrow(0, begin, count).copy_(linear(grad, transposed, GemmRole::kBf16));
      grad_head.add(weight_gradient(grad, h));
    }
    if (with_gradients)
      context->save_for_backward({grad_hidden, grad_head.finish().reshape(master.sizes())});
    context->set_materialize_grads(false);
    return at::full({}, tree_sum(loss.const_data_ptr<float>(), tokens), loss.options());
  }
  static variable_list backward(AutogradContext* context, variable_list grad_outputs) {
    if (!grad_outputs[0].defined()) return variable_list(6);
    const variable_list saved = context->get_saved_variables();
    return {saved[0] * grad_outputs[0], saved[1] * grad_outputs[0], {}, {}, {}, {}};
  }
};

}  // namespace

constinit CpuSlot<void(const CrossEntropyCpuParams&, int64_t, int64_t)> cross_entropy_cpu;

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
                                int64_t chunk,
                                const at::Tensor& master) {
  check_shape(hidden, {-1, -1}, "linear_cross_entropy: hidden");
  check_shape(head, {-1, hidden.size(1)}, "linear_cross_entropy: head");
  check_shape(targets, {hidden.size(0)}, "linear_cross_entropy: targets");
  if (targets.is_cpu() && targets.numel() > 0) {
    const int64_t most = targets.max().item<int64_t>();
    HADAL_CHECK(most < head.size(0), "linear_cross_entropy: target ", most, " of ", head.size(0));
  }
  if (reference_forced()) return reference::linear_cross_entropy(hidden, head, targets);
  if (use_cuda(hidden, head)) {
    const bool with_gradients =
        at::GradMode::is_enabled() && (hidden.requires_grad() || head.requires_grad());
    return LinearCrossEntropyCuda::apply(hidden, head, targets, chunk, with_gradients);
  }
  if (use_cpu_kernel(hidden) && use_cpu_kernel(head)) {
    const at::Tensor& trained = master.defined() ? master : head;
    check_shape(trained, {head.size(0), head.size(1)}, "linear_cross_entropy: master");
    const bool with_gradients =
        at::GradMode::is_enabled() && (hidden.requires_grad() || trained.requires_grad());
    return LinearCrossEntropyCpu::apply(hidden, trained, head.detach(), targets, chunk,
                                        with_gradients);
  }
  return LinearCrossEntropy::apply(hidden, head, targets, chunk);
}

}  // namespace hadal::ops
