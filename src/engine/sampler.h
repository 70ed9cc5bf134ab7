// Samplers of the engine over ops::draw_rows.
#pragma once

#include <cstdint>

#include "engine_core/sampler.h"

namespace hadal::engine {

class ModelSampler final : public engine_core::Sampler {
 public:
  /// Ids from `vocab_size` on have no text and are never chosen.
  explicit ModelSampler(int64_t vocab_size) : vocab_size_(vocab_size) {}
  void sample(std::span<const engine_core::DrawInput> inputs,
              std::span<engine_core::Sampled> sampled) override;
  engine_core::TokenScore score(std::span<const float> logits,
                                int64_t token,
                                int64_t top) const override;

 private:
  std::span<const float> with_text(std::span<const float> logits) const;
  int64_t vocab_size_;
};

}  // namespace hadal::engine
