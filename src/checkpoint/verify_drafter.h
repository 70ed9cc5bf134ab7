// Comparison of a DSpark drafter with recorded outputs of the official code, for verify(): folders
// whose expected.safetensors holds `prompt_lengths` (docs/numerics.md lists the keys).
#pragma once

#include "checkpoint/official.h"
#include "checkpoint/verify.h"

namespace hadal::checkpoint {

class TensorReader;

/// Whether the recording is one of a drafter.
bool records_drafter(const OfficialCheckpoint& checkpoint, const TensorReader& expected);

/// The drafter alone, fed with the recorded rows of the main model; the main model; both together,
/// whose text and rounds must be the recorded ones. Errors as verify().
void verify_drafter(const OfficialCheckpoint& checkpoint,
                    const TensorReader& expected,
                    const VerifyOptions& options,
                    const std::function<void(const VerifyLine&)>& report,
                    const CacheFactory& make_cache);

}  // namespace hadal::checkpoint
