// Grammars of custom tools (OpenAI's "lark" and "regex") as EBNF for xgrammar: internal to
// grammar_tools.cpp.
//
// What is taken: rules and terminals with any prefix or priority, literals (also "..."i), ranges
// "a".."z", regular expressions /.../ (flags s and u), (), [], |, ?, *, +, ~ n, ~ n..m, aliases,
// %ignore, %import of lark's `common` terminals. Every text that the rules derive is allowed,
// however it might be cut into terminals; %ignore may stand before and behind every terminal of a
// rule. Anything else is refused by name: what cannot be kept is not loosened. No text holds
// U+0001, which stands for the markup's marker.
#pragma once

#include <string>
#include <string_view>

namespace hadal::engine_core {

/// From the rule `start`. Errors: InputError beginning with `where`.
std::string lark_to_ebnf(std::string_view grammar, const std::string& where);

/// The whole text matches. Without borders, look-around and references back. Errors: the same.
std::string regex_to_ebnf(std::string_view pattern, const std::string& where);

}  // namespace hadal::engine_core
