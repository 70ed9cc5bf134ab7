#include "train/optimizer.h"

#include <bit>
#include <deque>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "train/adamw.h"
#include "train/muon.h"

namespace hadal::train {
namespace {

using model::Parameter;
using model::ParamKind;

}  // namespace

UpdateRule update_rule(const Parameter& parameter) {
  switch (parameter.kind) {
    case ParamKind::kMatrix:
    case ParamKind::kGroups:
    case ParamKind::kExperts:
    case ParamKind::kHcFn:
      return UpdateRule::kMuon;
    case ParamKind::kEmbedding:
    case ParamKind::kHead:
      return UpdateRule::kAdamDecay;
    case ParamKind::kNorm:
    case ParamKind::kHcBase:
    case ParamKind::kHcScale:
    case ParamKind::kSink:
    case ParamKind::kApe:
      return UpdateRule::kAdam;
    case ParamKind::kGateBias:
    case ParamKind::kHashTable:
      return UpdateRule::kNone;
  }
  return UpdateRule::kNone;
}

Optimizer::Optimizer(model::Transformer& model, OptimizerParams params, Ownership ownership)
    : params_(params), ownership_(std::move(ownership)) {
  model.visit([&](Parameter& parameter) {
    const UpdateRule rule = update_rule(parameter);
    if (rule == UpdateRule::kNone) return;
    HADAL_CHECK(parameter.value.requires_grad() && parameter.value.is_leaf(),
                "optimizer: ", parameter.name, " is no leaf that requires a gradient");
    const size_t index = slots_.size();
    const at::Tensor value = parameter.value.detach();
    const auto zeros = [&] {
      return ownership_.here(index) ? at::zeros_like(value)
                                    : at::empty_like(value, value.options().device(at::kMeta));
    };
    OptimizerSlot slot{.parameter = &parameter,
                       .rule = rule,
                       .owner = ownership_.owner(index),
                       .momentum = zeros(),
                       .variance = {}};
    if (rule != UpdateRule::kMuon) slot.variance = zeros();
    slots_.push_back(std::move(slot));
  });
}

void Optimizer::zero_grad() {
  for (OptimizerSlot& slot : slots_) slot.parameter->value.mutable_grad().reset();
}

void Optimizer::fill_gradients(const std::function<bool(const Parameter&)>& trained) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    OptimizerSlot& slot = slots_[i];
    const at::Tensor& value = slot.parameter->value;
    slot.trained = trained(*slot.parameter);
    HADAL_CHECK(slot.trained || !value.grad().defined(), "optimizer: ", slot.parameter->name,
                " has a gradient in a step that does not train it");
    if (slot.trained && ownership_.here(i) && !value.grad().defined())
      value.mutable_grad() = at::zeros_like(value.detach());
  }
}

std::vector<at::Tensor> Optimizer::gradients() const {
  std::vector<at::Tensor> grads;
  for (const OptimizerSlot& slot : slots_) {
    const at::Tensor& grad = slot.parameter->value.grad();
    if (grad.defined()) grads.push_back(grad);
  }
  return grads;
}

at::Tensor Optimizer::grad_norm() const {
  dist::Ranks one;
  return grad_norm(one);
}

at::Tensor Optimizer::grad_norm(dist::Ranks& ranks) const {
  const at::NoGradGuard no_grad;
  if (ranks.size() == 1) {
    const std::vector<at::Tensor> all = gradients();
    HADAL_CHECK(!all.empty(), "optimizer: no parameter has a gradient");
    return at::stack(at::_foreach_norm(all)).square().sum().sqrt();
  }
  // Each parameter's norm from its owner, bit by bit: then the sum over all of them is that of one
  // rank. Two words a parameter: whether it has a gradient, and the norm.
  std::vector<int64_t> words(2 * slots_.size(), 0);
  std::vector<size_t> here;
  std::vector<at::Tensor> own;
  for (size_t i = 0; i < slots_.size(); ++i) {
    const at::Tensor& grad = slots_[i].parameter->value.grad();
    if (!grad.defined()) continue;
    here.push_back(i);
    own.push_back(grad);
  }
  const std::vector<at::Tensor> norms =
      own.empty() ? std::vector<at::Tensor>() : at::_foreach_norm(own);
  for (size_t n = 0; n < norms.size(); ++n) {
    words[2 * here[n]] = 1;
    words[2 * here[n] + 1] = std::bit_cast<int64_t>(norms[n].item<double>());
  }
  ranks.sum(words);
  std::vector<at::Tensor> all;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (words[2 * i] == 0) continue;
    all.push_back(at::full({}, std::bit_cast<double>(words[2 * i + 1]),
                           slots_[i].parameter->value.scalar_type()));
  }
  HADAL_CHECK(!all.empty(), "optimizer: no parameter has a gradient");
  return at::stack(all).square().sum().sqrt();
}

at::Tensor Optimizer::clip_gradients(double max_norm) {
  dist::Ranks one;
  return clip_gradients(max_norm, one);
}

at::Tensor Optimizer::clip_gradients(double max_norm, dist::Ranks& ranks) {
  const at::NoGradGuard no_grad;
  const at::Tensor norm = grad_norm(ranks);
  const at::Tensor factor = (max_norm / (norm + 1e-12)).clamp_max(1.0);
  // A rank may own nothing that has a gradient.
  const std::vector<at::Tensor> own = gradients();
  if (!own.empty()) at::_foreach_mul_(own, factor);
  return norm;
}

void Optimizer::spread(dist::Ranks& ranks) {
  if (ranks.size() == 1) return;
  const at::NoGradGuard no_grad;
  std::vector<size_t> trained;
  std::vector<int64_t> bytes;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].trained) trained.push_back(i);
    bytes.push_back(static_cast<int64_t>(slots_[i].parameter->value.nbytes()));
  }
  struct Message {
    at::Tensor bundle;
    std::vector<at::Tensor> values;
    bool copies;  ///< out of the bundle when it has arrived
    dist::Transfer transfer;
  };
  std::deque<Message> messages;
  const auto finish = [](Message& message) {
    message.transfer.wait();
    if (!message.copies) return;
    const std::vector<at::Tensor> parts = unbundled(message.bundle, message.values);
    for (size_t i = 0; i < parts.size(); ++i) message.values[i].copy_(parts[i]);
  };
  constexpr size_t kUnderWay = 32;
  for (const std::vector<size_t>& indices : ownership_.bundles(trained, bytes)) {
    Message message;
    for (const size_t i : indices) message.values.push_back(slots_[i].parameter->value.detach());
    message.bundle = bundled(message.values);
    message.copies = !ownership_.here(indices[0]) && !message.bundle.is_same(message.values[0]);
    message.transfer = ranks.broadcast(message.bundle, ownership_.owner(indices[0]));
    messages.push_back(std::move(message));
    for (; messages.size() > kUnderWay; messages.pop_front()) finish(messages.front());
  }
  for (Message& message : messages) finish(message);
}

void Optimizer::step(double lr) {
  const at::NoGradGuard no_grad;
  ++num_steps_;
  muon_step(slots_, params_, lr);
  adamw_step(slots_, params_, num_steps_, lr);
}

std::vector<std::pair<std::string, at::Tensor>> Optimizer::state() {
  std::vector<std::pair<std::string, at::Tensor>> result;
  for (OptimizerSlot& slot : slots_) {
    result.emplace_back(slot.parameter->name + "/momentum", slot.momentum);
    if (slot.variance.defined())
      result.emplace_back(slot.parameter->name + "/variance", slot.variance);
  }
  return result;
}

}  // namespace hadal::train
