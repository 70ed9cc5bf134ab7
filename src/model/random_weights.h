// A model of any size with random weights in the form in which an accelerator serves them, made
// there: for benches.
#pragma once

#include <cstdint>

#include "model/transformer.h"

namespace hadal::model {

/// Gives every parameter values on `device`: matrices packed for `released`
/// (ops/gemm/sm90_random.h), norms 1, hash tables uniform, the rest small. Errors: Error for shapes
/// that the layout pads.
void fill_random_packed(Transformer& model, at::Device device, uint64_t seed);

}  // namespace hadal::model
