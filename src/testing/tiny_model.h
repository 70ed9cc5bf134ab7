// Seeded small models for tests and benches.
#pragma once

#include <cstdint>

#include "model/config.h"
#include "model/transformer.h"

namespace hadal::testing {

/// A small configuration: every kind of layer, widths too small for the
/// released formats.
model::ModelConfig tiny_config();

/// Small, but with widths that the released formats and the CUDA kernels take.
model::ModelConfig small_config();

/// The smallest model that the released formats take: a window layer with hashed experts, CSA, HCA,
/// CSA, and the MTP block.
model::ModelConfig mini_config();

/// The same model with a DSpark drafter in place of the MTP block: two stages, blocks of 4 tokens,
/// three target layers.
model::ModelConfig with_drafter(model::ModelConfig config);

/// The reference architecture of the shipped model.
model::ModelConfig nano_config();

/// A model with random weights (std scaled so that activations are of order one) and random biases,
/// sinks and mHC factors, in `dtype`.
model::Transformer random_model(const model::ModelConfig& config,
                                uint64_t seed,
                                at::ScalarType dtype);

}  // namespace hadal::testing
