// The grammar of a block of tool calls, as a structural tag of xgrammar: internal to grammar.cpp.
#pragma once

#include <string>
#include <string_view>

namespace hadal::engine {

/// The structural tag for the text of a kToolCalls grammar (grammar.h). Errors: InputError naming
/// the tool and what is wrong with it.
std::string tool_calls_structural_tag(std::string_view text);

/// Most characters of white space in a row in JSON: without a bound a model can write them for
/// ever.
inline constexpr int kMaxWhitespace = 16;

}  // namespace hadal::engine
