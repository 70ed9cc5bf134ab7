// The newest checkpoint of a run as a model folder, whatever its end looked like.
#pragma once

#include <string>

#include "checkpoint/save_model.h"
#include "train/run_config.h"
#include "train/run_state.h"

namespace hadal::train {

/// The config of the model that a run trains: its own file's, or that of the checkpoint it starts
/// from.
model::ModelConfig trained_config(const RunConfig& config);

/// Tokens of the longest rows that a run has really trained on so far, those of the checkpoint that
/// it started from included.
int64_t trained_length(const RunConfig& config, const RunProgress& progress);

/// How experts of the exported model are stored where it is quantised: in FP8 where the config says
/// so or the stage that was trained last computed in `fp8`, else in FP4. `progress` null: at the
/// end of the run.
model::ExpertDtype exported_experts(const RunConfig& config,
                                    const model::ModelConfig& trained,
                                    const RunProgress* progress);

/// The settings of generation that lie beside the architecture; empty: none do.
std::string generation_config(const RunConfig& config);

/// Writes the newest checkpoint of the run into `folder`, which must not exist; returns how far the
/// run was. Neither data nor the checks of a training run are needed. InputError without a
/// checkpoint, or when the widths of the model do not allow the format.
RunProgress export_run(const RunConfig& config,
                       const std::string& folder,
                       checkpoint::SaveFormat format);

}  // namespace hadal::train
