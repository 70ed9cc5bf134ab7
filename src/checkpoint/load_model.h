// A model out of an official checkpoint folder, ready for one numerics.
#pragma once

#include <string>

#include "checkpoint/official.h"
#include "model/transformer.h"

namespace hadal::checkpoint {

/// `released` when the checkpoint has scales, else `ideal`.
ops::Numerics default_numerics(const OfficialCheckpoint& checkpoint);

/// Fills a model with the checkpoint's values: FP32 in `ideal`; otherwise matrices, embedding and
/// head in BF16 (exact for FP8 and FP4 with power-of-two scales) and everything else in FP32.
/// InputError when the widths do not allow the numerics, or where values would have to be rounded
/// (F32 scales that are no powers of two).
model::Transformer load_model(const OfficialCheckpoint& checkpoint, ops::Numerics numerics);

}  // namespace hadal::checkpoint
