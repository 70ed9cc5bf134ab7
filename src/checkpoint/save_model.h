// A model to a checkpoint folder in the official layout.
#pragma once

#include <cstdint>
#include <string>

#include "model/transformer.h"

namespace hadal::checkpoint {

enum class SaveFormat {
  kOfficial,  ///< FP4 or FP8 experts, FP8 matrices, the rest BF16, FP32 and I64
  kBf16,      ///< all matrices BF16
};

struct SaveOptions {
  SaveFormat format = SaveFormat::kOfficial;
  /// Of kOfficial: kFp4 with E8M0 scales everywhere, or kFp8 as Base checkpoints are, with F32
  /// scales everywhere, all of them powers of two.
  model::ExpertDtype experts = model::ExpertDtype::kFp4;
  int64_t max_shard_bytes = int64_t{4} << 30;
  /// Written into the config; -1: what the model's config says.
  int64_t trained_length = -1;
  std::string tokenizer = "";          ///< a tokenizer.json to put beside the weights; empty: none
  std::string generation_config = "";  ///< a generation_config.json likewise
};

/// Writes config.json and the weights (of the model: a drafter of its config is no part of it) into
/// a folder that must not exist yet; it appears whole or not at all. Values are rounded as
/// ops::official_rounding does, so a model trained in `released`, or in `fp8` and saved with FP8
/// experts, computes the same after loading. A value that is not finite is an InputError that names
/// the tensor.
void save_model(const model::Transformer& model,
                const std::string& folder,
                const SaveOptions& options);

}  // namespace hadal::checkpoint
