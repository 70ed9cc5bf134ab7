// What training a model on some ranks takes, before anything is allocated: who moves which
// parameter, memory by kind, traffic and time of a step. A function of the configuration and of
// numbers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/config.h"
#include "ops/op.h"
#include "train/ownership.h"
#include "train/zero_plan.h"

namespace hadal::train {

struct TrainPlanParams {
  int64_t ranks = 1;
  int64_t cap = 0;  ///< ranks that share the dense matrices; 0: dense_cap
  int64_t step_tokens = 0, row_length = 0;
  ops::Numerics numerics = ops::Numerics::kBf16;
  bool copied_checkpoints = true;  ///< written beside the steps, from a copy
  double flops_per_second = 0.0;   ///< of a rank
  double bytes_per_second = 0.0;   ///< into a rank, and out of it
};

struct PlannedParameter {
  std::string name;
  UpdateRule rule;
  std::vector<int64_t> shape;
  /// What the rule takes as one: a matrix of Muon, an element of AdamW; empty for kNone.
  std::vector<int64_t> unit_shape;
  int64_t units = 0;
  int64_t pieces = 0, first_owner = 0, last_owner = 0;  ///< no pieces: every rank moves it alike
};

/// Bytes on one rank while a step runs.
struct RankMemory {
  double weights = 0.0;      ///< what forward passes read
  double masters = 0.0;      ///< FP32 of what it owns, where weights are rounded
  double moments = 0.0;      ///< of what it owns
  double gradients = 0.0;    ///< the nodes of its rows, and the sums of what it owns
  double activations = 0.0;  ///< the streams between blocks of one row, the least that is kept
  double checkpoint = 0.0;   ///< the copy of what it owns, while a checkpoint is written
  double total() const {
    return weights + masters + moments + gradients + activations + checkpoint;
  }
};

struct TrainPlan {
  std::vector<PlannedParameter> parameters;
  ZeroPlan zero;
  double elements = 0.0;  ///< that gradients move
  int64_t rows = 0, rows_of_rank = 0, gradient_sets = 0;
  RankMemory fullest;  ///< the most of each kind on any rank
  /// Bytes of a step, the most of any rank.
  double gradients_sent = 0.0, gradients_received = 0.0, values_received = 0.0;
  double pass_flops = 0.0;  ///< of a rank: forward and backward of the main layers and head
  double newton_schulz_flops = 0.0;  ///< the most of any rank
  /// One after the other, as the trainer runs them.
  double pass_seconds = 0.0, exchange_seconds = 0.0, optimizer_seconds = 0.0, spread_seconds = 0.0;
  double step_seconds() const {
    return pass_seconds + exchange_seconds + optimizer_seconds + spread_seconds;
  }
};

const char* rule_name(UpdateRule rule);

/// Errors: InputError where a step has less than one row.
TrainPlan make_train_plan(const model::ModelConfig& config, const TrainPlanParams& params);

/// The parameters that gradients move as plan_zero takes them, in the model's order.
std::vector<PlanItem> plan_items(const model::ModelConfig& config);

}  // namespace hadal::train
