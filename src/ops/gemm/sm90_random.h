// Random matrices in the layout of the Hopper kernels, made where they will lie: for benches of
// models that no checkpoint on this machine holds.
#pragma once

#include <cstdint>

#include "ops/gemm/sm90_matrices.h"

namespace hadal::ops {

struct RandomSm90Params {
  WeightFormat format = WeightFormat::kFp8;  ///< FP8, FP4 or BF16
  bool widened = false;                      ///< of FP8
  int64_t matrices = 1, out = 0, in = 0;
  uint64_t seed = 0;
};

/// Finite values of either sign, every matrix another, so scaled that a product with rows of
/// deviation 1 has about deviation 1. What the layout pads is random, too, so only the shapes that
/// it does not pad are taken: out a multiple of 64, in of 128 (BF16: 64). Errors: Error for others.
Sm90Matrices random_sm90(const RandomSm90Params& params, at::Device device);

}  // namespace hadal::ops
