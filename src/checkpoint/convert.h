// A checkpoint folder to another storage or to other names.
//
// official  FP4 or FP8 experts and FP8 matrices with scales; with the scales that a conversion to
//           BF16 kept, and weights that still lie on them, the very bytes they came from; without,
//           the smallest power-of-two scales under which no value changes; and where there are none
//           (weights trained or made otherwise) the rounding of ops::official_rounding
// bf16      every matrix BF16 under the official names, the original scales beside them
// f32       the same with every float F32 and no scales: what transformers saved in F32, unrounded
// hf-bf16   every tensor under the name transformers gives it, experts stacked, no scales; with the
//           config, the tokenizer's settings and the chat template that transformers reads
// hf-f32    the same in F32
//
// Names of the input and its storage are found out from its tensors.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "checkpoint/official.h"

namespace hadal::checkpoint {

enum class ConvertTarget { kBf16, kF32, kOfficial, kHfBf16, kHfF32 };
/// "bf16", "f32", "official", "hf-bf16" or "hf-f32"; InputError for anything else.
ConvertTarget parse_convert_target(const std::string& name);

struct ConvertOptions {
  std::string in, out;  ///< folders; `out` must not exist, or be empty
  ConvertTarget target = ConvertTarget::kBf16;
  bool drop_scales = false;  ///< bf16: leave the original scales out
  int64_t max_shard_bytes = int64_t{4} << 30;
  std::function<void(int64_t done, int64_t total, const std::string& name)> progress = {};
};

struct ConvertReport {
  int64_t tensors = 0;        ///< of the model, scales not counted
  int64_t kept_scales = 0;    ///< written beside BF16 weights, or used to get the original bytes
  int64_t found_scales = 0;   ///< official: scales chosen anew without changing a value
  int64_t rounded = 0;        ///< tensors of which at least one value changed
  std::string first_rounded;  ///< one of them
  Naming naming = Naming::kOfficial;  ///< of the input
  bool mtp_beside_hf = false;         ///< hf-bf16: an MTP block that transformers would drop
};

/// Writes the folder whole or not at all. Bad input is an InputError: a folder that exists, tensors
/// that are missing, unexpected or of a wrong shape.
ConvertReport convert(const ConvertOptions& options);

}  // namespace hadal::checkpoint
