// What /v1/responses repeats of a request and how it answers: shared by its reader and its writer.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "server/openai_reading.h"
#include "server/openai_types.h"

namespace hadal::server {

struct ResponseShape {
  Json instructions, max_output_tokens, temperature, top_p, effort, format, tools, tool_choice,
      metadata, parallel;
  ToolNames names;         ///< how clients call the tools
  bool encrypted = false;  ///< reasoning items also carry their text sealed
  bool logprobs = false;   ///< of the output's text
  Notes notes;             ///< what was left out
  Json previous;           ///< id of the response it goes on from
  /// Takes the answer once it is whole; empty: it is not kept.
  std::function<void(const std::string& id, const Json& response)> keep;
};
std::unique_ptr<Format> response_format(const text::Tokenizer& tokenizer, ResponseShape shape);

}  // namespace hadal::server
