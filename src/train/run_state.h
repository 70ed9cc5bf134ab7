// Checkpoints of a training run: everything that its next step depends on, in one folder that
// appears whole or not at all.
//
// `<out>/checkpoints/step-N` holds state.safetensors (FP32 masters by parameter name, optimizer
// state by name and suffix) and progress.json. Data order, schedules and initialisation follow from
// the configuration, so there is nothing else to keep.
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

/// Writes a checkpoint and removes the oldest beyond `keep`. Of several ranks each writes what it
/// owns, into one file in a folder that all must see; the first makes it and gives it its name. The
/// bytes are those that one rank would write. Errors: InputError where a rank does not see the
/// folder.
void save_state(const std::string& out,
                const RunProgress& progress,
                int64_t keep,
                model::Transformer& model,
                Optimizer& optimizer,
                dist::Ranks& ranks);

/// Removes what a process that was killed while it wrote has left below a run's folder: unfinished
/// checkpoints, token files, metrics and models. Only for whoever holds the run's lock.
void remove_leftovers(const std::string& out);

/// The complete checkpoints below a run's folder, oldest first.
std::vector<std::string> complete_states(const std::string& out);

/// RunProgress::parts alone.
StageParts load_parts(const std::string& folder);

/// The model of a checkpoint of this configuration, its values in the mapped file: to be read, not
/// written.
model::Transformer open_masters(const std::string& folder, const model::ModelConfig& config);

/// Restores model and optimizer in place, of the optimizer's state what this rank owns, whatever
/// the number of ranks that saved; before Optimizer::hold_for, while values are the masters.
/// InputErrors name file and tensor where the checkpoint is of another model or damaged; nothing is
/// changed then.
RunProgress load_state(const std::string& folder, model::Transformer& model, Optimizer& optimizer);

}  // namespace hadal::train
