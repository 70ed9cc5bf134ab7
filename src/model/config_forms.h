// The parts of a config.json that come in two forms: the official one (compress_ratios,
// num_hash_layers, rope_scaling) and the one that Hugging Face transformers writes (layer_types,
// mlp_layer_types, compress_rates, rope_parameters). Where a file has both, they must agree.
#pragma once

#include "base/json.h"
#include "model/config.h"

namespace hadal::model {

/// compress_ratios and n_hash_layers of n_layers and n_mtp_layers, which are read before.
void read_layer_kinds(const JsonObject& root, ModelConfig& config);

/// rope_head_dim, both bases and the YaRN values; of head_dim, which is read before.
void read_rope(const JsonObject& root, ModelConfig& config);

/// The DSpark drafter, if the config names one: its stages are the entries of compress_ratios that
/// follow the main layers. Sets n_mtp_layers to 0 then.
void read_drafter(const JsonObject& root, ModelConfig& config);

}  // namespace hadal::model
