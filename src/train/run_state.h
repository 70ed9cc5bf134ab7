// Checkpoints of a training run: everything that its next step depends on, in one folder that
// appears whole or not at all.
//
// `<out>/checkpoints/step-N` holds state.safetensors (FP32 masters by parameter name, optimizer
// state by name and suffix), progress.json and manifest.json (train/state_manifest.h); StateSaver
// writes it. Data order, schedules and initialisation follow from the configuration, so there is
// nothing else to keep.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "dist/ranks.h"
#include "model/transformer.h"
#include "train/optimizer.h"

namespace hadal::train {

/// Tokens of each stage, part by part: a stage whose `tokens` were raised after it had begun keeps
/// its rows, and those of the rest follow them.
using StageParts = std::vector<std::vector<int64_t>>;

struct RunProgress {
  int64_t step = 0;
  int64_t stage = 0;
  int64_t row = 0;     ///< next row of the stage
  int64_t tokens = 0;  ///< consumed
  int64_t skipped_steps = 0;
  std::vector<uint64_t> plan;  ///< RowPlan::fingerprint of the stages begun
  StageParts parts;            ///< tokens of the stages begun; checkpoints of old have none
};

/// The content of progress.json.
std::string progress_json(const RunProgress& progress, const Optimizer& optimizer);

/// Removes the oldest checkpoints beyond `keep`.
void remove_older_states(const std::string& out, int64_t keep);

/// Removes what a process that was killed while it wrote has left below a run's folder: unfinished
/// checkpoints, token files, metrics and models. Only for whoever holds the run's lock.
void remove_leftovers(const std::string& out);

/// The newest checkpoint below a run's folder by its name; empty: none.
std::string newest_state(const std::string& out);

/// The newest checkpoint that is whole (verify_state); empty where there is no checkpoint at all.
/// Newer ones are told in a warning that says what is wrong, and `set_aside` renames them to
/// step-N.damaged: only for whoever holds the run's lock. Errors: InputError where there are
/// checkpoints, but none is whole; nothing is renamed then.
std::string newest_whole_state(const std::string& out, bool set_aside);

/// RunProgress::parts alone.
StageParts load_parts(const std::string& folder);

/// The model of a checkpoint of this configuration, its values in the mapped file: to be read, not
/// written.
model::Transformer open_masters(const std::string& folder, const model::ModelConfig& config);

/// Restores model and optimizer in place, of the optimizer's state what this rank owns, whatever
/// the number of ranks that saved; before Optimizer::hold_for, while values are the masters.
/// InputErrors name file and tensor where the checkpoint is of another model; nothing is changed
/// then. Checksums are newest_whole_state's. Of the old format, too.
RunProgress load_state(const std::string& folder, model::Transformer& model, Optimizer& optimizer);

}  // namespace hadal::train
