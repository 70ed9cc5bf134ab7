#include "train/step_sums.h"

#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include "base/check.h"
#include "train/slots.h"

namespace hadal::train {

void add_in_place(at::Tensor& left, at::Tensor right) {
  if (!right.defined()) return;
  if (left.defined()) {
    left.add_(right);
  } else {
    left = std::move(right);
  }
}

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

StepSums::StepSums(const model::Transformer& model, int64_t first) : next_(first) {
  model.visit([&](const model::Parameter& parameter) {
    if (parameter.elsewhere && parameter.trainable()) return parameters_.push_back({});
    if (!parameter.value.defined() || !parameter.value.requires_grad()) return;
    parameters_.push_back(parameter.value);
    on_cpu_ = on_cpu_ && parameter.value.is_cpu();
    parameter.value.mutable_grad().reset();
  });
}

void StepSums::add(StepMeasures measures) {
  const at::NoGradGuard no_grad;
  StepNode leaf{.span = {next_, next_ + 1}, .gradients = {}, .measures = std::move(measures)};
  ++next_;
  leaf.gradients.reserve(parameters_.size());
  for (const at::Tensor& parameter : parameters_) {
    if (!parameter.defined()) {
      leaf.gradients.emplace_back();
      continue;
    }
    leaf.gradients.push_back(std::move(parameter.mutable_grad()));
    parameter.mutable_grad().reset();
  }
  nodes_.push_back(std::move(leaf));
  // Elsewhere bits depend on the cut anyway: one set of gradients is enough.
  if (!on_cpu_) {
    while (nodes_.size() > 1) join_last();
    return;
  }
  constexpr int64_t kUnknown = INT64_MAX;  // how many leaves there are is told last
  join_meeting(nodes_, kUnknown, [&](StepNode& left, StepNode& right) { join(left, right); });
}

StepMeasures StepSums::finish() {
  HADAL_CHECK(!nodes_.empty(), "step: no passes");
  const at::NoGradGuard no_grad;
  while (nodes_.size() > 1) join_last();
  StepNode root = std::move(nodes_.front());
  nodes_.clear();
  for (size_t i = 0; i < parameters_.size(); ++i)
    if (parameters_[i].defined()) parameters_[i].mutable_grad() = std::move(root.gradients[i]);
  return std::move(root.measures);
}

std::vector<StepNode> StepSums::take(int64_t leaves) {
  const at::NoGradGuard no_grad;
  if (on_cpu_)
    join_meeting(nodes_, leaves, [&](StepNode& left, StepNode& right) { join(left, right); });
  return std::move(nodes_);
}

void StepSums::join_last() {
  StepNode& left = nodes_[nodes_.size() - 2];
  join(left, nodes_.back());
  left.span.end = nodes_.back().span.end;
  nodes_.pop_back();
}

void StepSums::join(StepNode& left, StepNode& right) const {
  for_each_slot(parameters_.size(), on_cpu_,
                [&](size_t i) { add_in_place(left.gradients[i], std::move(right.gradients[i])); });
  left.measures.add(right.measures);
}

}  // namespace hadal::train
