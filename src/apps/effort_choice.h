// Which levels of reasoning effort a checkpoint was taught. Config, tensors and tokenizer do not
// tell: the official encoder that lies beside the weights does, or the user.
#pragma once

#include <string>

#include "model/config.h"
#include "text/chat_format.h"

namespace hadal::apps {

struct EffortChoice {
  text::EffortLevels levels = text::EffortLevels::kPreview;
  std::string reason;   ///< for people
  bool certain = true;  ///< false: a drafter, and nothing that says whose
};

/// `flag`: --effort-levels, or empty. InputError for a flag that is neither preview nor 0731.
EffortChoice choose_effort_levels(const std::string& folder,
                                  const model::ModelConfig& config,
                                  const std::string& flag);

}  // namespace hadal::apps
