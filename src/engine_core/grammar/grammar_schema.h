// What a grammar may ask for, checked before xgrammar reads it: internal to grammar.cpp.
//
// xgrammar leaves out what it does not know or cannot combine, and the answers would not match; its
// parsers recurse and unroll. So what it would drop, and what would cost the stack or the memory,
// is refused by name.
#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace hadal::engine_core {

/// A regular expression or a grammar. Errors: InputError beginning with `where`.
void check_pattern(std::string_view text, const std::string& where);
/// A JSON schema with all below it. Errors: InputError beginning with `where` and the path.
void check_schema(const nlohmann::json& schema, const std::string& where);

}  // namespace hadal::engine_core
