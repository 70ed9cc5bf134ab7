// Drafts by the model's DSpark drafter: a block of tokens ahead of each sequence.
#pragma once

#include <span>

#include "engine/model_runner.h"
#include "engine_core/sampler.h"

namespace hadal::engine {

class DsparkDrafter final : public engine_core::Drafter {
 public:
  /// Both must outlive it; `runner` drafts blocks. A block's drafts end before the first, but for
  /// the very first, whose confidence is below `threshold` (0: none does): a probability, which
  /// depends on the tokens before it alone.
  DsparkDrafter(ModelRunner& runner, engine_core::Sampler& sampler, double threshold)
      : runner_(runner), sampler_(sampler), threshold_(threshold) {}
  /// What the sampler would draw if the drafter's logits were the model's, token by token: with the
  /// same randomness and masks, so that a draft is the token drawn as often as the two agree.
  void draft(std::span<engine_core::DraftRequest> requests) override;

 private:
  ModelRunner& runner_;
  engine_core::Sampler& sampler_;
  double threshold_;
};

}  // namespace hadal::engine
