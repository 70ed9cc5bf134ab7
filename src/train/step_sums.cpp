#include "train/step_sums.h"

#include <bit>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "train/slots.h"

namespace hadal::train {
namespace {

/// left += right in left's memory, which nobody else holds.
void add_in_place(at::Tensor& left, at::Tensor right) {
  if (!right.defined()) return;
  if (left.defined()) {
    left.add_(right);
  } else {
    left = std::move(right);
  }
}

}  // namespace

void StepMeasures::add(const StepMeasures& other) {
  const auto sum = [](at::Tensor& to, const at::Tensor& from) {
    if (from.defined()) to = to.defined() ? to + from : from;
  };
  sum(main_loss, other.main_loss);
  sum(mtp_loss, other.mtp_loss);
  sum(balance_loss, other.balance_loss);
  sum(index_loss, other.index_loss);
  sum(clamped, other.clamped);
  if (expert_load.size() < other.expert_load.size()) expert_load.resize(other.expert_load.size());
  for (size_t i = 0; i < other.expert_load.size(); ++i) sum(expert_load[i], other.expert_load[i]);
}

StepSums::StepSums(const model::Transformer& model) {
  model.visit([&](const model::Parameter& parameter) {
    if (!parameter.value.defined() || !parameter.value.requires_grad()) return;
    parameters_.push_back(parameter.value);
    on_cpu_ = on_cpu_ && parameter.value.is_cpu();
    parameter.value.mutable_grad().reset();
  });
}

void StepSums::add(StepMeasures measures) {
  const at::NoGradGuard no_grad;
  Node leaf{.gradients = {}, .measures = std::move(measures)};
  leaf.gradients.reserve(parameters_.size());
  for (const at::Tensor& parameter : parameters_) {
    leaf.gradients.push_back(std::move(parameter.mutable_grad()));
    parameter.mutable_grad().reset();
  }
  nodes_.push_back(std::move(leaf));
  ++leaves_;
  // Elsewhere bits depend on the cut anyway: one set of gradients is enough.
  if (!on_cpu_) {
    while (nodes_.size() > 1) join();
    return;
  }
  for (int level = std::countr_zero(leaves_); level > 0; --level) join();
}

StepMeasures StepSums::finish() {
  HADAL_CHECK(!nodes_.empty(), "step: no passes");
  const at::NoGradGuard no_grad;
  while (nodes_.size() > 1) join();
  Node root = std::move(nodes_.front());
  nodes_.clear();
  for (size_t i = 0; i < parameters_.size(); ++i)
    parameters_[i].mutable_grad() = std::move(root.gradients[i]);
  return std::move(root.measures);
}

void StepSums::join() {
  Node right = std::move(nodes_.back());
  nodes_.pop_back();
  Node& left = nodes_.back();
  for_each_slot(parameters_.size(), on_cpu_,
                [&](size_t i) { add_in_place(left.gradients[i], std::move(right.gradients[i])); });
  left.measures.add(right.measures);
}

}  // namespace hadal::train
