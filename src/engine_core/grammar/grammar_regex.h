// Regular expressions as expressions of EBNF: internal to grammar_lark.cpp.
#pragma once

#include <string>
#include <string_view>

#include "engine_core/grammar/char_ranges.h"

namespace hadal::engine_core {

/// In parentheses. `dot_all`: `.` matches a newline, too. Errors: InputError beginning with
/// `where` for what no grammar can say, or what has no meaning.
std::string regex_expression(std::string_view pattern, bool dot_all, const std::string& where);

/// One of these characters, U+0001 and surrogates left out. Errors: InputError if none is left.
std::string class_expression(const Ranges& ranges, const std::string& where);
/// The text itself.
std::string literal_expression(std::string_view text, bool any_case, const std::string& where);

}  // namespace hadal::engine_core
