// What a run begins with: its device, its model's configuration, its model. Everything that can be
// wrong with a configuration is found here, before anything is written.
#pragma once

#include <string>
#include <vector>

#include <c10/core/Device.h>

#include "data/token_shards.h"
#include "model/transformer.h"
#include "train/run_config.h"

namespace hadal::train {

/// "cpu", "cuda" or "auto". Errors: InputError where CUDA was asked for and is not there.
at::Device pick_device(const std::string& name);

/// The model's configuration. Errors: InputError where the machine or the stages cannot train it.
model::ModelConfig checked_model_config(const RunConfig& config);

/// New weights, or those of init_checkpoint, dense and FP32. Errors: InputError for tokens outside
/// the vocabulary and for a checkpoint of another model.
model::Transformer build_model(const RunConfig& config,
                               const model::ModelConfig& model_config,
                               const std::vector<data::TokenShards>& sources);

}  // namespace hadal::train
