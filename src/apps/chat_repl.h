// The loop of `hadal chat`: lines in, answers and commands' results out.
#pragma once

#include <string>

#include "apps/chat_session.h"

namespace hadal::apps {

struct ReplOptions {
  bool json = false;    ///< every answer as a line of JSON
  bool history = true;  ///< lines are kept for the next time
};

/// Until the end of standard input or /quit.
void run_chat(const LoadedModel& loaded, ChatSettings settings, const ReplOptions& options);

}  // namespace hadal::apps
