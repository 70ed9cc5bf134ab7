// Drafts by the model's own MTP block: one token ahead of each sequence.
#pragma once

#include <span>

#include "engine/model_runner.h"
#include "engine_core/sampler.h"

namespace hadal::engine {

class MtpDrafter final : public engine_core::Drafter {
 public:
  /// Both must outlive it; `runner` has room for the MTP block.
  MtpDrafter(ModelRunner& runner, engine_core::Sampler& sampler)
      : runner_(runner), sampler_(sampler) {}
  /// What the sampler would draw if the MTP block's logits were the model's: with the same
  /// randomness, so that the draft is the token drawn as often as the two agree. Sequences whose
  /// last streams the runner does not have (just resumed) get no draft.
  void draft(std::span<engine_core::DraftRequest> requests) override;

 private:
  ModelRunner& runner_;
  engine_core::Sampler& sampler_;
};

}  // namespace hadal::engine
