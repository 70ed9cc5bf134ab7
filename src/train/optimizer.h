// The optimizer of model.md 17.1 to 17.3: Muon for matrices, AdamW for the rest, one learning rate
// for both.
//
// State lives beside each parameter and is exposed for checkpoints. A step is a fixed sequence of
// tensor operations, so that equal gradients give equal bits.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "dist/ranks.h"
#include "model/transformer.h"
#include "train/ownership.h"

namespace hadal::train {

struct OptimizerParams {
  double weight_decay = 0.1;
  double muon_momentum = 0.95;
  double muon_update_rms = 0.18;  ///< gamma: RMS of a full-rank update before the learning rate
  double adam_beta1 = 0.9;
  double adam_beta2 = 0.95;
  double adam_eps = 1e-20;
  bool low_precision_muon = false;  ///< Newton-Schulz products in BF16
};

/// Which rule moves a parameter.
enum class UpdateRule { kMuon, kAdamDecay, kAdam, kNone };
UpdateRule update_rule(const model::Parameter& parameter);

/// A parameter with its state. On ranks that do not own it the state is a meta tensor: shape and
/// type without memory.
struct OptimizerSlot {
  model::Parameter* parameter;
  UpdateRule rule;
  int64_t owner;
  bool trained = true;  ///< by this step: fill_gradients
  at::Tensor momentum;  ///< Muon: momentum; AdamW: first moment
  at::Tensor variance;  ///< AdamW only
};

class Optimizer {
 public:
  /// Takes every trainable parameter of the model; their values must be FP32 or FP64 leaves with
  /// requires_grad. Holds the state of what the rank owns.
  Optimizer(model::Transformer& model, OptimizerParams params, Ownership ownership = {});

  void zero_grad();
  /// Says what the step trains, for all that follows in it: of that, what this rank owns has a
  /// gradient from here on, zeros where it had none. Nothing else may have one.
  void fill_gradients(const std::function<bool(const model::Parameter&)>& trained);
  /// Euclidean norm over all gradients [], computed in a fixed order: one number, the same on every
  /// rank and on any number of them.
  at::Tensor grad_norm(dist::Ranks& ranks) const;
  at::Tensor grad_norm() const;
  /// Multiplies every gradient by min(1, max_norm / norm) on the device; returns the norm before.
  at::Tensor clip_gradients(double max_norm, dist::Ranks& ranks);
  at::Tensor clip_gradients(double max_norm);
  /// One update with learning rate lr > 0; parameters without gradient stay as they are.
  void step(double lr);
  /// After step(): every rank gets its owner's values of each parameter that was trained.
  void spread(dist::Ranks& ranks);

  /// Named state tensors, in a fixed order, those of other ranks as meta tensors; assigning to them
  /// restores a checkpoint.
  std::vector<std::pair<std::string, at::Tensor>> state();
  const std::vector<OptimizerSlot>& slots() const { return slots_; }
  const Ownership& ownership() const { return ownership_; }
  int64_t num_steps() const { return num_steps_; }
  void set_num_steps(int64_t steps) { num_steps_ = steps; }

 private:
  std::vector<at::Tensor> gradients() const;

  OptimizerParams params_;
  Ownership ownership_;
  std::vector<OptimizerSlot> slots_;
  int64_t num_steps_ = 0;
};

}  // namespace hadal::train
