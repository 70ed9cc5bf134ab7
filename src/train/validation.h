// What a model makes of a run's validation rows.
#pragma once

#include <c10/core/Device.h>

#include "dist/mesh.h"
#include "dist/ranks.h"
#include "train/objective.h"
#include "train/pipeline.h"
#include "train/schedule.h"

namespace hadal::train {

/// Evaluates the rows under a stage's mode and numerics: on the CPU one at a time, elsewhere
/// `micro_rows`. Each data rank takes some of them, its stages their layers; the result is on all
/// ranks, with the bits of one.
///   pipeline  null: this rank has all layers
Evaluation evaluate_rows(const model::Transformer& model,
                         const PackedRows& rows,
                         int64_t micro_rows,
                         const Stage& rules,
                         at::Device device,
                         dist::Ranks& ranks,
                         const dist::Mesh& mesh,
                         Pipeline* pipeline);

}  // namespace hadal::train
