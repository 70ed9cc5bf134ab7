// Muon (model.md 17.2): momentum, orthogonalisation of each logical matrix, decoupled decay.
#pragma once

#include <span>

#include "train/optimizer.h"

namespace hadal::train {

/// Moves the parameters of the slots whose rule is kMuon and that have a gradient; lr > 0. Without
/// gradients of its own.
void muon_step(std::span<OptimizerSlot> slots, const OptimizerParams& params, double lr);

}  // namespace hadal::train
