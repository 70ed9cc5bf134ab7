// AdamW (model.md 17.3): the parameters that are no matrices.
#pragma once

#include <cstdint>
#include <span>

#include "train/optimizer.h"

namespace hadal::train {

/// Moves the parameters of the slots whose rule is kAdam or kAdamDecay and that have a gradient;
/// `num_steps` counts this step, too; lr > 0. Without gradients of its own.
void adamw_step(std::span<OptimizerSlot> slots,
                const OptimizerParams& params,
                int64_t num_steps,
                double lr);

}  // namespace hadal::train
