// What changes during training, as pure functions of the tokens consumed (model.md 17.4).
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/context.h"
#include "ops/op.h"

namespace hadal::train {

/// A stretch of training with one way of attending, one row length and one mixture of sources.
struct Stage {
  std::string name;
  int64_t tokens = 0;  ///< taken from the sources; padding comes on top
  int64_t row_length = 0;
  model::AttentionMode mode = model::AttentionMode::kDense;
  ops::Numerics numerics = ops::Numerics::kBf16;
  /// Share of the stage's tokens by source name; shares are relative.
  std::vector<std::pair<std::string, double>> mix;
  double learning_rate = 0.0;  ///< 0: the run's schedule
};

struct LearningRate {
  double peak = 0.0;
  int64_t warmup_tokens = 0;       ///< linear from 0
  int64_t decay_start_tokens = 0;  ///< constant before
  int64_t decay_end_tokens = 0;    ///< cosine down to `final`, constant after
  double final_rate = 0.0;

  /// The rate of a step that begins after `tokens` tokens and takes `step_tokens`: its middle
  /// counts, so that the first step of a warm-up is not 0.
  double at(int64_t tokens, int64_t step_tokens) const;
};

/// Batch size in tokens from a number of consumed tokens on.
struct BatchRamp {
  int64_t from_tokens = 0;
  int64_t tokens = 0;
};

struct Schedule {
  LearningRate learning_rate;
  std::vector<BatchRamp> batch;  ///< ascending from_tokens, the first 0
  double mtp_weight = 0.3;
  double mtp_weight_decay = 0.1;  ///< from the start of the learning rate's decay

  int64_t batch_tokens(int64_t tokens) const;
  double mtp_weight_at(int64_t tokens) const {
    return tokens < learning_rate.decay_start_tokens ? mtp_weight : mtp_weight_decay;
  }
};

/// "dense", "indexer_warmup" or "sparse". Errors: InputError beginning with `origin`.
model::AttentionMode parse_attention_mode(const std::string& name, const std::string& origin);
const char* attention_mode_name(model::AttentionMode mode);

}  // namespace hadal::train
