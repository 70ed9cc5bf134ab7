// A model out of an official checkpoint folder, ready for one numerics.
#pragma once

#include <string>

#include "checkpoint/official.h"
#include "model/transformer.h"

namespace hadal::checkpoint {

/// `released` when the checkpoint has scales, else `ideal`.
ops::Numerics default_numerics(const OfficialCheckpoint& checkpoint);

/// How the matrices of a loaded model are held.
enum class Held {
  kPacked,  ///< for the CPU's matrix kernel: FP4, FP8 and BF16 as stored; what serves requests
  kDense,   ///< as tensors: for training and other devices
};

/// Fills a model with the checkpoint's values, none of them rounded: FP32 in `ideal`; otherwise
/// matrices and head as BF16 values (exact for FP8 and FP4 with power-of-two scales), or FP32 where
/// they are stored in F32 or F16, and everything else in FP32. Only the embedding is BF16 in every
/// numerics but `ideal`: its rows are activations. The values, and the results, do not depend on
/// how they are held. InputError when the widths do not allow the numerics, where values would have
/// to be rounded (F32 scales that are no powers of two), and for values that cannot be right
/// (weight_checks.h).
model::Transformer load_model(const OfficialCheckpoint& checkpoint,
                              ops::Numerics numerics,
                              Held held = Held::kPacked);

}  // namespace hadal::checkpoint
