// FP32 to BF16 by chance: the mean of many roundings is the value.
#pragma once

#include <cstdint>

#include <ATen/core/Tensor.h>

namespace hadal::train {

/// What a draw depends on; equal keys give equal roundings.
struct RoundingKey {
  uint64_t seed;    ///< of run and parameter
  int64_t step;     ///< of the optimizer
  int64_t node;     ///< first row of the sum; below 2^24
  int64_t element;  ///< number of the first element in its parameter, below 2^42
};

/// `values` FP32, flat, on the CPU: BF16 of the same size. A value between two neighbours becomes
/// the upper one with the probability of its distance to the lower one, in steps of 2^-16, so the
/// error is below 2^-7 of the value where it is normal. What BF16 holds stays, NaN and infinity
/// too; a finite value stays finite. An element's draw is its own, whatever piece it comes in.
at::Tensor stochastic_bf16(const at::Tensor& values, const RoundingKey& key);

}  // namespace hadal::train
