// One training run: rows in, checkpoints and metrics out.
//
// A run is a function of its configuration: interrupted at any moment and started again, it goes on
// from the newest checkpoint and ends, on the CPU, with the same bits as without the interruption.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "dist/ranks.h"
#include "train/run_config.h"
#include "train/run_state.h"

namespace hadal::train {

enum class RunOutcome { kFinished, kStopped };

class Trainer {
 public:
  /// Tokenises, plans, and builds or restores the model. Takes a lock on the run's folder: an
  /// InputError when another process trains there. All ranks give the same configuration; `ranks`
  /// must outlive the trainer. Errors: InputError where the files of two ranks differ.
  Trainer(RunConfig config, dist::Ranks& ranks);
  ~Trainer();

  const RunProgress& progress() const;
  int64_t total_tokens() const;
  const model::Transformer& model() const;

  /// Trains until the end, or until `stop` is true on any rank before a step; a checkpoint is
  /// written either way. The first rank writes metrics, log and model. Errors: InputError after ten
  /// steps in a row without finite gradients.
  RunOutcome run(const std::function<bool()>& stop);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hadal::train
