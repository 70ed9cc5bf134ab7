// Muon (model.md 17.2): momentum, orthogonalisation of each logical matrix, decoupled decay.
#pragma once

#include <span>

#include "train/optimizer.h"
#include "train/slots.h"

namespace hadal::train {

/// Moves those of the pieces whose rule is kMuon, whole matrices each; lr > 0. A matrix gets the
/// bits that it would get alone. Without gradients of its own.
void muon_step(std::span<const MovedPiece> pieces, const OptimizerParams& params, double lr);

}  // namespace hadal::train
