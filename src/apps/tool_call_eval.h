// How often a model calls tools in the right form, on dialogues that hold such calls.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "apps/loaded_model.h"

namespace hadal::apps {

struct ToolCallScore {
  int64_t turns = 0;
  int64_t well_formed = 0;     ///< parsed without a fault
  int64_t known_tool = 0;      ///< of these: at least one call, each of a tool that was offered
  int64_t same_tool = 0;       ///< of these: the first call names the recorded tool
  int64_t same_arguments = 0;  ///< of these: with the recorded arguments, as JSON text
};

struct ToolCallOptions {
  int64_t turns = 100;       ///< at most; one of every dialogue
  int64_t max_tokens = 256;  ///< an answer
};

/// Reads dialogues {"messages", "tools", "thinking_mode"?} line by line. Of the i-th dialogue with
/// calls it takes its turn i mod n (n turns of the assistant with calls), lets the model answer
/// what went before, always with the most likely token, and compares. `progress` gets the turns
/// done. InputErrors name file and line; a file without such turns is one.
ToolCallScore score_tool_calls(const LoadedModel& loaded,
                               const std::string& path,
                               const ToolCallOptions& options,
                               const std::function<void(const ToolCallScore&)>& progress);

}  // namespace hadal::apps
