// Drafts by the model's own MTP block: one token ahead of each sequence.
#pragma once

#include <span>

#include "engine/model_runner.h"
#include "engine_core/sampler.h"

namespace hadal::engine {

class MtpDrafter final : public Drafter {
 public:
  /// `runner` must outlive it and have room for the MTP block.
  explicit MtpDrafter(ModelRunner& runner) : runner_(runner) {}
  /// The most likely token. Sequences whose last streams the runner does not have (just resumed)
  /// get no draft.
  void draft(std::span<DraftRequest> requests) override;

 private:
  ModelRunner& runner_;
};

}  // namespace hadal::engine
