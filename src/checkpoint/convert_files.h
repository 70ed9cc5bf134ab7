// What lies beside the weights of a converted checkpoint: its config.json, and the files that
// transformers' AutoTokenizer, chat templates and generate() read.
#pragma once

#include <string>

#include "checkpoint/names.h"
#include "model/config.h"

namespace hadal::checkpoint {

struct ConfigTarget {
  Storage storage;    ///< of the weights
  bool transformers;  ///< layer_types, rope_parameters, ... instead of the official keys
  bool f32;           ///< the floats are F32
};

/// The config.json of the input for the storage and the form of the output; every other key as it
/// is. `config` is what the input's files hold. InputError for a model that transformers' keys
/// cannot describe.
std::string converted_config(const std::string& path,
                             const model::ModelConfig& config,
                             const ConfigTarget& target);

/// Completes a folder for transformers: BOS, EOS and pad in tokenizer_config.json,
/// generation_config.json, and a chat template that renders plain conversations (system, user,
/// assistant) as the official encoder does. Nothing that is there already changes, and without
/// tokenizer.json only generation_config.json is written.
void write_transformers_files(const std::string& folder, const model::ModelConfig& config);

}  // namespace hadal::checkpoint
