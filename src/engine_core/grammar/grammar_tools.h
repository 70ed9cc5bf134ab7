// The grammar of a block of tool calls, as a structural tag of xgrammar: internal to grammar.cpp.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "engine_core/grammar/grammar_calls.h"
#include "engine_core/grammar/grammar_marker.h"

namespace hadal::engine_core {

struct ToolGrammar {
  std::string structural_tag;
  MarkerGuard::Watch watch = MarkerGuard::Watch::kNothing;
  std::vector<CallParameters> calls;  ///< what the tag cannot say: of any order, each one once
  bool has_preferences = false;       ///< of tools with "strict": "prefer"
};

/// The structural tag for the text of a kToolCalls grammar (grammar.h). `prefer`: whether to try
/// the schemas of tools with "strict": "prefer". Errors: InputError naming the tool and what is
/// wrong with it.
ToolGrammar read_tool_grammar(std::string_view text, bool prefer);

/// Most characters of white space in a row in JSON: a model can write runs of them for ever.
inline constexpr int kMaxWhitespace = 1;

}  // namespace hadal::engine_core
