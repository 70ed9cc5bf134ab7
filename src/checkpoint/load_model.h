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

/// Fills a model with the checkpoint's values: FP32 in `ideal`; otherwise matrices, embedding and
/// head as BF16 values (exact for FP8 and FP4 with power-of-two scales) and everything else in
/// FP32. The values, and the results, do not depend on how they are held. InputError when the
/// widths do not allow the numerics, or where values would have to be rounded (F32 scales that are
/// no powers of two).
model::Transformer load_model(const OfficialCheckpoint& checkpoint,
                              ops::Numerics numerics,
                              Held held = Held::kPacked);

}  // namespace hadal::checkpoint
