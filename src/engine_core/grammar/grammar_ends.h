// Whether a grammar has an end: internal to grammar.cpp.
//
// A rule that always needs itself, or a class of no characters, would leave an answer without a
// token that may come. xgrammar takes such grammars; here they are found in its own notation of
// them.
#pragma once

#include <string_view>

namespace hadal::engine_core {

/// `grammar`: as xgrammar prints it. Errors: InputError beginning with `where` that names the rule
/// without an end.
void check_ends(std::string_view grammar, std::string_view where);

}  // namespace hadal::engine_core
