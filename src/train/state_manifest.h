// What a whole checkpoint says of itself: manifest.json, written last, with a checksum of
// everything beside it. A file without its manifest, one that another save has written, a flipped
// bit: all differ from it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "train/state_copy.h"

namespace hadal::train {

inline constexpr const char* kStateFile = "state.safetensors";
inline constexpr const char* kProgressFile = "progress.json";
inline constexpr const char* kManifestFile = "manifest.json";
inline constexpr const char* kStateFormat = "hadal training state 2";
/// Without a manifest and checksums.
inline constexpr const char* kOldStateFormat = "hadal training state 1";

/// `checksums`: those of all blocks of all tensors of `state`, in order. The other files are in the
/// folder already.
void write_manifest(const std::string& folder,
                    int64_t step,
                    const std::vector<NamedState>& state,
                    const std::vector<int64_t>& checksums);

/// Reads all of a checkpoint. Errors: InputError naming file and tensor, what was expected and what
/// found. Of the old format only what its files say of themselves is checked; false then.
bool verify_state(const std::string& folder);

}  // namespace hadal::train
