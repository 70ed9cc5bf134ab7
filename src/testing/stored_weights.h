// Random matrices in the number formats of checkpoints, with their values.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

#include "ops/gemm/panels.h"

namespace hadal::testing {

/// A matrix as a checkpoint stores it, and its values in scalar code of its own.
struct Stored {
  at::Tensor data, scale;
  at::Tensor values;  ///< [out, in] BF16
};

/// E2M1 pairs [out, in / 2] with a UE8M0 scale for every 32 inputs.
Stored make_fp4(int64_t out, int64_t in, unsigned seed);
/// E4M3 [out, in] with a UE8M0 scale for every 128 x 128 block.
Stored make_fp8(int64_t out, int64_t in, unsigned seed);

/// FP4 codes whose scales lie within 2^14 of each other in a row, as sm90 wants them; a group of
/// zeros with a scale far off, and negative zeros. Values by way of panels.
Stored near_fp4(int64_t out, int64_t in, unsigned seed);

/// Random activations behind FP8's round trip, [rows, in] BF16.
at::Tensor fp8_rows(int64_t rows, int64_t in);

ops::Panels fp4(const Stored& stored);
ops::Panels fp8(const Stored& stored);

}  // namespace hadal::testing
