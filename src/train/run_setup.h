// What a run begins with: its device, its model's configuration, its model. Everything that can be
// wrong with a configuration is found here, before anything is written.
#pragma once

#include <string>
#include <vector>

#include <c10/core/Device.h>

#include "data/token_shards.h"
#include "dist/ranks.h"
#include "model/stage_split.h"
#include "model/transformer.h"
#include "train/ownership.h"
#include "train/run_config.h"

namespace hadal::train {

/// "cpu", "cuda" or "auto". Errors: InputError where CUDA was asked for and is not there.
at::Device pick_device(const std::string& name);

/// The device of a run. Errors: InputError where several ranks would train on something else than
/// the CPU.
at::Device training_device(const RunConfig& config, const dist::Ranks& ranks);

/// Ranks set up one after the other: the first makes the run's files and finds what is wrong with
/// its configuration, and only then do the others look. The first passes at once.
dist::Ranks& after_the_first(dist::Ranks& ranks);
void let_the_others_follow(dist::Ranks& ranks);

/// Errors: InputError naming the ranks whose configuration file or newest checkpoint is another
/// than the first rank's.
void check_that_ranks_agree(const RunConfig& config,
                            const std::string& newest_checkpoint,
                            dist::Ranks& ranks);

/// How many ranks train, in which mesh, and what masters and moments each holds, in the log.
void report_ranks(const Ownership& ownership,
                  const model::StageSplit& split,
                  const dist::Ranks& ranks);

/// The mesh of the run on these ranks. Errors: InputError that names the key which does not fit.
dist::Mesh checked_mesh(const RunConfig& config,
                        const model::ModelConfig& model_config,
                        const dist::Ranks& ranks);

/// The model's configuration. Errors: InputError where the machine or the stages cannot train it.
model::ModelConfig checked_model_config(const RunConfig& config);

/// Which stage of the run's pipeline has what of a model. Errors: InputError that names the key
/// where the layers cannot be shared out so.
model::StageSplit stage_split(const RunConfig& config, const model::ModelConfig& model_config);

/// New weights, or those of init_checkpoint, dense and FP32, of one stage of the pipeline. Errors:
/// InputError for tokens outside the vocabulary and for a checkpoint of another model.
model::Transformer build_model(const RunConfig& config,
                               const model::ModelConfig& model_config,
                               const std::vector<data::TokenShards>& sources,
                               int64_t stage);

}  // namespace hadal::train
