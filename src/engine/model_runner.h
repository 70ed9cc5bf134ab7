// Runs steps of many sequences through the model over the paged caches.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <ATen/core/Tensor.h>

#include "engine/kv_cache.h"
#include "engine_core/runner.h"
#include "model/transformer.h"

namespace hadal::engine {

class ModelRunner final : public Runner {
 public:
  /// Both must outlive the runner. The cache's numerics must be `numerics`.
  ModelRunner(const model::Transformer& model,
              ops::Numerics numerics,
              KvCache& cache,
              int64_t slack);

  int64_t vocab_size() const override { return model_.config().vocab_size; }
  int64_t slack() const override { return slack_; }
  /// Errors: Error for an id outside the vocabulary or a step that the cache refuses.
  void run(std::span<const SequenceStep> steps) override;
  std::span<const float> logits(int64_t sequence, int64_t token) const override;
  /// Rings are addressed by position, so nothing moves.
  void rewind(int64_t slot, int64_t pos) override;

 private:
  const model::Transformer& model_;
  ops::Numerics numerics_;
  KvCache& cache_;
  int64_t slack_;
  at::Tensor logits_;                  // [asked-for tokens, vocab] FP32
  std::vector<int64_t> first_logits_;  // [sequences + 1]
};

}  // namespace hadal::engine
