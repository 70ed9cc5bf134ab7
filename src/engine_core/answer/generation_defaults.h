// What a request or a command that says nothing gets: the model's own settings.
//
// They lie in generation_config.json beside the weights, in the words that Hugging Face's tools
// use (temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, do_sample), and one of
// ours: `thinking`, false for a model that was not taught to reason first. Other keys are other
// tools' and are passed over. Every command, API and the page take them from here.
#pragma once

#include <string>
#include <string_view>

#include "engine_core/request.h"

namespace hadal::engine_core {

struct GenerationDefaults {
  Sampling sampling;
  bool thinking = true;    ///< as the official API has it
  int64_t max_tokens = 0;  ///< of an answer; 0: the model says nothing
};

/// Errors: InputError naming `where`, the key, the range and what was found.
GenerationDefaults parse_generation_defaults(std::string_view json, const std::string& where);

/// Of a checkpoint's folder; what the architecture has where there is no such file.
GenerationDefaults load_generation_defaults(const std::string& folder);

}  // namespace hadal::engine_core
