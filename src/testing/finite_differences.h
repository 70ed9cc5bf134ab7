// Gradients of autograd against central differences in float64.
//
// A function that chooses (top-k, routing) or clamps is not differentiable where its choice
// changes: entries for which it does between x - h and x + h are skipped and counted, never
// silently dropped.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace hadal::testing {

struct DifferenceOptions {
  double step = 1e-6;
  /// |difference - gradient| <= relative * max(|gradient|, RMS of the tensor's gradient) +
  /// absolute.
  double relative = 1e-6;
  double absolute = 2e-9;
  int64_t samples = 0;  ///< entries per tensor, drawn from `seed` without repetition; 0: all
  uint64_t seed = 1;
  double max_skipped = 0.03;  ///< of all entries looked at
};

struct DifferenceReport {
  int64_t checked = 0, skipped = 0;
  /// Largest |difference - gradient| / max(|gradient|, RMS, 1e-3) and where it was.
  double worst = 0.0;
  std::string where;
};

/// A tensor that is moved entry by entry, in place, and what autograd says about it (undefined: no
/// gradient, which means that no entry may matter).
struct DifferenceVariable {
  std::string name;
  at::Tensor value;  ///< contiguous FP64; its entries are restored
  at::Tensor grad;
};

using TensorList = std::vector<at::Tensor>;

/// The core: `outputs` evaluates the function at the variables' current values, `weights` project
/// its outputs on a scalar whose gradients the variables carry. `choices` (may be empty) gives
/// integral or boolean tensors that must not differ between x - h and x + h; it is asked only where
/// the gradients disagree. Expects agreement and few skips (gtest), prints one line.
DifferenceReport compare_differences(const std::string& name,
                                     const std::vector<DifferenceVariable>& variables,
                                     const std::function<TensorList()>& outputs,
                                     const TensorList& weights,
                                     const DifferenceOptions& options,
                                     const std::function<TensorList()>& choices = {});

/// For functions of tensors: differentiates every FP64 input of `call`, the outputs projected on
/// seeded random weights. Inputs of other types and undefined ones are passed on.
DifferenceReport check_gradients(const std::string& name,
                                 const std::function<TensorList(const TensorList&)>& call,
                                 const TensorList& inputs,
                                 const DifferenceOptions& options = {},
                                 const std::function<TensorList(const TensorList&)>& choices = {});

}  // namespace hadal::testing
