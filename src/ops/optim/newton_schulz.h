// Muon's orthogonalisation of a batch of matrices (model.md 17.2).
#pragma once

#include "base/fwd.h"

namespace hadal::ops {

/// Drives every singular value of each matrix to 1: X0 = U / ||U||_F, then 8 steps X <- a X + b (X
/// X^T) X + c (X X^T)^2 X with (3.4445, -4.7750, 2.0315) and 2 with (2, -1.5, 0.5), on the side of
/// the smaller Gram matrix. A matrix of zeros stays one.
///   u  [batch, rows, cols] FP32 or FP64; each matrix gets the bits it would get alone
///   low_precision  multiply in BF16 (GPU training)
at::Tensor newton_schulz(const at::Tensor& u, bool low_precision = false);

}  // namespace hadal::ops
