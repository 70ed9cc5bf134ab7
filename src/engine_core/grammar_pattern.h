// Patterns of strings inside JSON, put so that xgrammar keeps what it takes apart: internal to
// grammar.cpp.
//
// xgrammar matches a pattern in ASCII by an automaton that leaves out what JSON must escape. Other
// patterns it expands into rules without that, and a `"` or a line break could end the string. The
// markup's marker it keeps out of strings without a pattern only, and then drops their lengths.
#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace hadal::engine {

struct JsonPattern {
  std::string text;
  bool plain = true;  ///< it matches nothing that JSON must escape, so rules are as good
};

/// The pattern in ASCII. `in_markup`: and without what could match the first character of the
/// markup's marker. Errors: InputError beginning with `where` for what cannot be put so.
JsonPattern json_pattern(std::string_view pattern, bool in_markup, const std::string& where);

/// Puts the patterns of a schema and of all below it so, in tool calls (`in_markup`) also the
/// lengths of strings, which are patterns then. Returns whether it changed anything. Errors:
/// InputError for a pattern that JSON cannot hold.
bool prepare_strings(nlohmann::ordered_json& schema, bool in_markup, const std::string& where);

}  // namespace hadal::engine
