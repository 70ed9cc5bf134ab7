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
  /// Gradients of experts go to their owners as BF16, rounded by chance, and are added in FP32:
  /// half the traffic, and bits that depend on the number of ranks.
  bool bf16_expert_gradients = false;
  uint64_t seed = 1;  ///< of those roundings
};

/// A parameter that takes a gradient.
struct OptimizerSlot {
  model::Parameter* parameter;
  UpdateRule rule;
  bool trained = true;  ///< by this step: fill_gradients
};

/// A piece of a parameter that this rank moves; tensors are flat, of its elements.
struct OwnedPiece {
  PlanPiece piece;  ///< its item is the number of the slot
  model::Parameter* parameter;
  UpdateRule rule;
  at::Tensor master;    ///< FP32 where the parameter's value is rounded, else undefined
  at::Tensor momentum;  ///< Muon: momentum; AdamW: first moment
  at::Tensor variance;  ///< AdamW only
  at::Tensor gradient;  ///< of several ranks the sum; on one the parameter has it

  /// The master, or the piece of the parameter's value, which then is one.
  at::Tensor values() const;
};

/// A tensor of a checkpoint: what of it this rank has.
struct StateTensor {
  std::string name;
  at::Tensor whole;  ///< a meta tensor: shape and type
  struct Part {
    int64_t begin;      ///< element
    at::Tensor values;  ///< flat; assigning to it restores a checkpoint
  };
  std::vector<Part> parts;
};

class Optimizer {
 public:
  /// Takes every trainable parameter of the model; their values must be FP32 or FP64 leaves with
  /// requires_grad, contiguous. Holds moments and masters of what the rank owns.
  Optimizer(model::Transformer& model, OptimizerParams params, Ownership ownership = {});

  /// What forward passes in `numerics` read from here on. Of several ranks, where those numerics
  /// round a parameter before they compute with it, its value becomes a BF16 leaf of the rounded
  /// values, whose gradient is FP32, and FP32 is left in the masters alone; in `ideal` every rank
  /// holds FP32. On all ranks alike.
  void hold_for(ops::Numerics numerics, dist::Ranks& ranks);

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
  /// After step(): every rank gets its owner's values of each piece that was trained, rounded where
  /// values are; gradients are dropped.
  void spread(dist::Ranks& ranks);

  /// Named moments, in a fixed order.
  std::vector<StateTensor> state() const;
  /// The masters of a slot's parameter on this rank.
  StateTensor masters(size_t slot) const;
  const std::vector<OptimizerSlot>& slots() const { return slots_; }
  const std::vector<OwnedPiece>& pieces() const { return pieces_; }
  /// The sum of a piece's gradients; `piece` counts the ownership's, and is this rank's.
  void set_gradient(size_t piece, at::Tensor gradient);
  const Ownership& ownership() const { return ownership_; }
  const OptimizerParams& params() const { return params_; }
  int64_t num_steps() const { return num_steps_; }
  void set_num_steps(int64_t steps) { num_steps_ = steps; }

 private:
  at::Tensor gradient(const OwnedPiece& piece) const;
  std::vector<at::Tensor> gradients() const;
  std::vector<double> squares() const;
  void spread(const std::vector<size_t>& pieces, dist::Ranks& ranks);
  /// A bundle of values, whose first piece this is, on its way from its owner to all who read it.
  std::vector<dist::Transfer> send_to_readers(const at::Tensor& bundle,
                                              size_t piece,
                                              dist::Ranks& ranks) const;

  OptimizerParams params_;
  Ownership ownership_;
  std::vector<OptimizerSlot> slots_;
  std::vector<OwnedPiece> pieces_;  ///< this rank's
  std::vector<int64_t> place_;      ///< of each of the ownership's pieces among them, or -1
  ops::Numerics numerics_ = ops::Numerics::kIdeal;
  at::ScalarType type_ = at::kFloat;  ///< of masters
  int64_t num_steps_ = 0;
};

}  // namespace hadal::train
