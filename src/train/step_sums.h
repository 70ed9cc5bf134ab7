// What the passes of a step sum, gradients and measures, by one binary tree over their rows
// (docs/decisions/0018-sums-over-tokens.md).
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "model/transformer.h"
#include "train/step_share.h"

namespace hadal::train {

/// Sums over a step, kept on the device until somebody logs them.
struct StepMeasures {
  at::Tensor main_loss, mtp_loss, balance_loss, index_loss;  ///< [] each, already divided
  std::vector<at::Tensor> expert_load;  ///< per block [experts] I64; undefined where hashed
  /// [4] I64: gate above the limit, up above, up below, and the number of values looked at;
  /// undefined when not asked for.
  at::Tensor clamped;

  /// Adds another's sums; what is undefined adds nothing.
  void add(const StepMeasures& other);
};

/// One node of the step's tree: the sums over the leaves of a span.
struct StepNode {
  Span span;
  std::vector<at::Tensor> gradients;  ///< of the parameters that take one, in the model's order
  StepMeasures measures;
};

/// left += right in left's memory, which nobody else holds; what is undefined adds nothing.
void add_in_place(at::Tensor& left, at::Tensor right);

/// Leaf first + i is the i-th pass of this process. Two sums meet at the level of the highest bit
/// in which the numbers of their leaves differ, so a run of 2^k passes that begins at a multiple of
/// 2^k is a subtree. At most log2(passes) + 1 sets of gradients are held; on a GPU, where passes
/// are added in their order, two.
class StepSums {
 public:
  /// Drops the gradients that the parameters have.
  explicit StepSums(const model::Transformer& model, int64_t first = 0);

  /// The gradients that a pass left in the parameters, which then have none, and its measures. A
  /// parameter without a gradient adds nothing.
  void add(StepMeasures measures);
  /// Puts the sums of the gradients into the parameters and returns those of the measures. After
  /// the last pass, once.
  StepMeasures finish();
  /// Instead of finish() where the passes are some of a step's `leaves`: their nodes_of.
  std::vector<StepNode> take(int64_t leaves);

  /// What takes a gradient, in the model's order; undefined where another stage has it.
  const std::vector<at::Tensor>& parameters() const { return parameters_; }
  bool on_cpu() const { return on_cpu_; }

 private:
  void join(StepNode& left, StepNode& right) const;
  void join_last();

  std::vector<at::Tensor> parameters_;
  bool on_cpu_ = true;
  std::vector<StepNode> nodes_;
  int64_t next_ = 0;  ///< number of the next leaf
};

}  // namespace hadal::train
