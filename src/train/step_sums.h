// What the passes of a step sum, gradients and measures, by one binary tree over their rows
// (docs/decisions/0018-sums-over-tokens.md).
#pragma once

#include <vector>

#include <ATen/core/Tensor.h>

#include "model/transformer.h"

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

/// Leaf i is the i-th pass of the step. Two sums meet at the level of the highest bit in which the
/// numbers of their leaves differ, so a run of 2^k passes that begins at a multiple of 2^k is a
/// subtree. At most log2(passes) + 1 sets of gradients are held; on a GPU, where passes are added
/// in their order, two.
class StepSums {
 public:
  /// Drops the gradients that the parameters have.
  explicit StepSums(const model::Transformer& model);

  /// The gradients that a pass left in the parameters, which then have none, and its measures. A
  /// parameter without a gradient adds nothing.
  void add(StepMeasures measures);
  /// Puts the sums of the gradients into the parameters and returns those of the measures. After
  /// the last pass, once.
  StepMeasures finish();

 private:
  struct Node {
    std::vector<at::Tensor> gradients;  ///< of parameters_
    StepMeasures measures;
  };
  void join();  ///< the last two nodes

  std::vector<at::Tensor> parameters_;
  bool on_cpu_ = true;
  std::vector<Node> nodes_;
  uint64_t leaves_ = 0;
};

}  // namespace hadal::train
