// What a run tells: metrics of its steps and validations (docs/training.md), and the log.
#pragma once

#include <cstdint>

#include "base/metrics.h"
#include "train/run_state.h"
#include "train/schedule.h"
#include "train/step.h"

namespace hadal::train {

/// The metrics of the step that `progress` counts last.
void report_step(MetricsWriter& metrics,
                 const RunProgress& progress,
                 const StepOutcome& outcome,
                 double learning_rate,
                 int64_t step_tokens,
                 double seconds);

/// `name`/loss and what the indexer's choice keeps.
void report_validation(MetricsWriter& metrics,
                       const RunProgress& progress,
                       const char* name,
                       const Stage& rules,
                       const Evaluation& result);

}  // namespace hadal::train
