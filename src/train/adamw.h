// AdamW (model.md 17.3): the parameters that are no matrices.
#pragma once

#include <cstdint>
#include <span>

#include "train/optimizer.h"
#include "train/slots.h"

namespace hadal::train {

/// Moves those of the pieces whose rule is kAdam or kAdamDecay; `num_steps` counts this step, too;
/// lr > 0. Without gradients of its own.
void adamw_step(std::span<const MovedPiece> pieces,
                const OptimizerParams& params,
                int64_t num_steps,
                double lr);

}  // namespace hadal::train
