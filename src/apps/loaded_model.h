// A model with its tokenizer, as every command loads it.
#pragma once

#include <functional>
#include <string>

#include "apps/effort_choice.h"
#include "checkpoint/load_model.h"
#include "engine_core/answer/generation_defaults.h"
#include "text/tokenizer.h"

namespace hadal::apps {

/// A checkpoint folder ready to run.
struct LoadedModel {
  std::string folder;
  ops::Numerics numerics;
  model::Transformer model;
  text::Tokenizer tokenizer;
  engine_core::GenerationDefaults defaults;  ///< the folder's
  EffortChoice effort;  ///< the levels of reasoning effort that the model was taught

  const model::ModelConfig& config() const { return model.config(); }
};

/// `folder_flag`: --model, or empty for the default one (model_folder.h). `numerics_flag`:
/// --numerics, or empty for what the checkpoint's scales say. InputError when the tokenizer knows
/// ids that the model does not.
LoadedModel load_with_tokenizer(const std::string& folder_flag,
                                const std::string& numerics_flag,
                                at::Device device = at::kCPU);

using StopFunction = std::function<bool()>;

enum class Finish { kStop, kLength, kInterrupted };
/// "stop", "length", "interrupted".
const char* finish_name(Finish finish);

}  // namespace hadal::apps
