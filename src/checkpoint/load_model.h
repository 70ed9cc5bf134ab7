// A model out of an official checkpoint folder, ready for one numerics.
#pragma once

#include <string>

#include "checkpoint/official.h"
#include "model/transformer.h"

namespace hadal::checkpoint {

/// `released` when experts are stored in FP4, `fp8` when they are in FP8 (Base checkpoints),
/// `ideal` without scales.
ops::Numerics default_numerics(const OfficialCheckpoint& checkpoint);

/// How the matrices of a loaded model are held.
enum class Held {
  kPanels,       ///< for the CPU's matrix kernel: FP4, FP8 and BF16 as stored; serves requests
  kDense,        ///< as tensors: for training, and for what a device's library multiplies
  kAccelerator,  ///< as an accelerator's kernels read them (ops::Weight's sm90): in `released` FP4
                 ///< and FP8 as stored, with scales, and BF16; in `bf16` BF16 alone; the rest dense
};

struct LoadTarget {
  Held held = Held::kPanels;
  at::Device device = at::kCPU;  ///< kPanels: the CPU
};

/// Where what serves requests on a device is loaded to.
LoadTarget serving_target(at::Device device);

/// Fills a model with the checkpoint's values, none of them rounded: FP32 in `ideal`; otherwise
/// matrices and head as BF16 values (exact for FP8 and FP4 with power-of-two scales), or FP32 where
/// they are stored in F32 or F16, and everything else in FP32. Only the embedding is BF16 in every
/// numerics but `ideal`: its rows are activations. FP8 whose F32 scales are no powers of two has no
/// exact values: its codes are held beside them, or, in kDense, its values rounded once to FP32.
/// The values, and the results on the CPU, do not depend on how they are held. In `ideal` nothing
/// is held in codes. Matrices in codes for which the target has no exact form are held in BF16; for
/// an accelerator a warning counts them. InputError when the widths do not allow the numerics, for
/// FP4 experts in `fp8`, for `fp8` and such scales on an accelerator, and for values that cannot be
/// right (weight_checks.h).
model::Transformer load_model(const OfficialCheckpoint& checkpoint,
                              ops::Numerics numerics,
                              LoadTarget target = {});

/// The same for a model that was declared from the checkpoint's config: of each parameter its shard
/// is loaded, and nothing of those elsewhere.
void load_weights(model::Transformer& model,
                  const OfficialCheckpoint& checkpoint,
                  ops::Numerics numerics,
                  LoadTarget target = {});

}  // namespace hadal::checkpoint
