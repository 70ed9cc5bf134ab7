#include "text/dsml_tag.h"

#include <algorithm>

namespace hadal::text::dsml {
namespace {

bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool is_tag_space(char c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

bool is_block(std::string_view name) { return name == "tool_calls" || name == "function_calls"; }

std::string_view name_of(std::string_view text) {
  return text.substr(
      0, static_cast<size_t>(std::find_if_not(text.begin(), text.end(), is_letter) - text.begin()));
}

std::string_view skip_space(std::string_view text) {
  while (!text.empty() && is_tag_space(text.front())) text.remove_prefix(1);
  return text;
}

/// name="..." string="..." in any order; false if that is not what stands here.
bool read_attributes(std::string_view rest, Tag& tag) {
  while (!(rest = skip_space(rest)).empty()) {
    const std::string_view name = name_of(rest);
    if (name.empty()) return false;
    rest = skip_space(rest.substr(name.size()));
    if (!rest.starts_with('=')) return false;
    rest = skip_space(rest.substr(1));
    std::string_view value;
    if (rest.starts_with('"') || rest.starts_with('\'')) {
      const size_t end = rest.find(rest.front(), 1);
      if (end == std::string_view::npos) return false;
      value = rest.substr(1, end - 1);
      rest.remove_prefix(end + 1);
      if (!rest.empty() && !is_tag_space(rest.front())) return false;
    } else {
      value = rest.substr(
          0,
          static_cast<size_t>(std::find_if(rest.begin(), rest.end(), is_tag_space) - rest.begin()));
      if (value.find_first_of("\"'") != std::string_view::npos) return false;
      rest.remove_prefix(value.size());
    }
    if (name == "name") tag.key = value;
    if (name == "string") tag.mark = value;
  }
  return true;
}

/// What the encoder writes, whatever its name holds.
bool read_encoded(std::string_view rest, Tag& tag) {
  constexpr std::string_view kName = " name=\"", kTrue = "\" string=\"true\"",
                             kFalse = "\" string=\"false\"";
  if (!rest.starts_with(kName)) return false;
  rest.remove_prefix(kName.size());
  if (tag.name == "parameter") {
    const bool is_string = rest.ends_with(kTrue);
    if (!is_string && !rest.ends_with(kFalse)) return false;
    tag.mark = is_string ? "true" : "false";
    tag.key = rest.substr(0, rest.size() - (is_string ? kTrue : kFalse).size());
    return true;
  }
  if (!rest.ends_with('"')) return false;
  tag.key = rest.substr(0, rest.size() - 1);
  return true;
}

}  // namespace

bool is_tag_start(std::string_view before, char c) {
  if (before.empty()) return c == '/' || is_letter(c);
  return before != "/" || is_letter(c);
}

bool ends_without_bracket(std::string_view before, bool closing, char c) {
  if (before.starts_with('/')) {
    before.remove_prefix(1);
    closing = true;
  }
  const std::string_view name = name_of(before);
  if (name.empty() || name.size() != before.size() || is_letter(c) || c == '>' || c == ' ')
    return false;
  return closing || is_block(name);
}

bool read_tag(std::string_view text, bool closing, Tag& tag) {
  const bool bracket = text.ends_with('>');
  if (bracket) text.remove_suffix(1);
  tag = {};
  tag.closing = closing;
  tag.regular = bracket;
  if (text.starts_with('/')) {
    text.remove_prefix(1);
    tag.regular = false;
    tag.closing = true;
  }
  tag.name = name_of(text);
  if (tag.name.empty()) return false;
  text.remove_prefix(tag.name.size());
  if (text.empty()) {
    const bool whole = tag.closing || is_block(tag.name);
    return bracket || whole;
  }
  const bool bare = tag.closing || is_block(tag.name);
  if (bare || (tag.name != "invoke" && tag.name != "parameter")) {
    tag.regular = false;
    return bracket || skip_space(text).empty();
  }
  if (!bracket) return false;
  Tag read = tag;
  Tag encoded = tag;
  const bool is_encoded = read_encoded(text, encoded);
  if (read_attributes(text, read)) {
    // As encoded, unless the key swallowed other attributes.
    read.regular =
        tag.regular && is_encoded && read.key == encoded.key && read.mark == encoded.mark;
    tag = std::move(read);
    return true;
  }
  if (is_encoded) tag = std::move(encoded);
  return is_encoded;
}

}  // namespace hadal::text::dsml
