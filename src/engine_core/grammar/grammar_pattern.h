// Patterns and lengths of strings inside JSON, put so that they speak of the characters a string
// holds while xgrammar matches the text between its quotes: internal to grammar.cpp.
//
// xgrammar takes a pattern for that text as it stands, and leaves out of it what JSON must escape:
// no string with a pattern or a length could hold a quotation mark. Here each part of a pattern
// that matches such characters gets their escapes as alternatives.
#pragma once

#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace hadal::engine_core {

struct JsonPattern {
  std::string text;
  bool plain = true;  ///< it matches nothing that JSON must escape
};

/// The pattern of the text between the quotes, in ASCII. Errors: InputError beginning with `where`
/// for broken escapes and for classes that match no character.
JsonPattern json_pattern(std::string_view pattern, const std::string& where);

/// Puts the patterns and lengths of a schema and of all below it so. Returns whether it changed
/// anything. Errors: InputError for a pattern that cannot be.
bool prepare_strings(nlohmann::ordered_json& schema, const std::string& where);

}  // namespace hadal::engine_core
