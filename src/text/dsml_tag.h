// One tag of DSML, from behind its marker: internal to the parser of completions.
//
// Attributes come in any order and quoted in either way. Names and keys are not escaped when they
// are written, so what the encoder writes is read to its end even if it holds quotes.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace hadal::text::dsml {

struct Tag {
  bool closing = false;
  bool regular = true;  ///< as the encoder writes it
  std::string name;
  std::optional<std::string> key, mark;  ///< the attributes `name` and `string`
};

/// Whether a tag can go on with `c` behind `before`; a marker without a name is no tag.
bool is_tag_start(std::string_view before, char c);
/// Whether `before` is a whole tag but for its `>`, which does not come: `c` is no part of it.
bool ends_without_bracket(std::string_view before, bool closing, char c);
/// Reads a tag up to its `>`, or up to the text's end if that is missing. False: not all of a tag.
bool read_tag(std::string_view text, bool closing, Tag& tag);

}  // namespace hadal::text::dsml
