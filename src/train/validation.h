// What a model makes of a run's validation rows.
#pragma once

#include <c10/core/Device.h>

#include "train/objective.h"
#include "train/schedule.h"

namespace hadal::train {

/// Evaluates the rows, `micro_rows` at a time, under a stage's mode and numerics.
Evaluation evaluate_rows(const model::Transformer& model,
                         const PackedRows& rows,
                         int64_t micro_rows,
                         const Stage& rules,
                         at::Device device);

}  // namespace hadal::train
