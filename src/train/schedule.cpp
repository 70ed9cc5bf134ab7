#include "train/schedule.h"

#include <cmath>
#include <numbers>

#include "base/check.h"

namespace hadal::train {

double LearningRate::at(int64_t tokens, int64_t step_tokens) const {
  const double now = static_cast<double>(tokens) + 0.5 * static_cast<double>(step_tokens);
  const auto warmup = static_cast<double>(warmup_tokens);
  if (now < warmup) return peak * now / warmup;
  const auto start = static_cast<double>(decay_start_tokens);
  const auto end = static_cast<double>(decay_end_tokens);
  if (now < start) return peak;
  if (now >= end) return final_rate;
  const double progress = (now - start) / (end - start);
  return final_rate + (peak - final_rate) * 0.5 * (1.0 + std::cos(std::numbers::pi * progress));
}

int64_t Schedule::batch_tokens(int64_t tokens) const {
  HADAL_CHECK(!batch.empty() && batch.front().from_tokens == 0, "schedule: no batch size");
  int64_t size = batch.front().tokens;
  for (const BatchRamp& ramp : batch) {
    if (tokens >= ramp.from_tokens) size = ramp.tokens;
  }
  return size;
}

model::AttentionMode parse_attention_mode(const std::string& name, const std::string& origin) {
  if (name == "dense") return model::AttentionMode::kDense;
  if (name == "indexer_warmup") return model::AttentionMode::kIndexerWarmup;
  if (name == "sparse") return model::AttentionMode::kSparse;
  throw InputError(
      concat(origin, ": expected dense, indexer_warmup or sparse, found \"", name, "\""));
}

const char* attention_mode_name(model::AttentionMode mode) {
  switch (mode) {
    case model::AttentionMode::kDense:
      return "dense";
    case model::AttentionMode::kIndexerWarmup:
      return "indexer_warmup";
    case model::AttentionMode::kSparse:
      return "sparse";
  }
  return "?";
}

}  // namespace hadal::train
