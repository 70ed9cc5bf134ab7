#include "engine_core/grammar_pattern.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <xgrammar/xgrammar.h>

#include <nlohmann/json.hpp>

#include "base/check.h"

namespace hadal::engine {
namespace {

using Json = nlohmann::ordered_json;

constexpr uint32_t kMarker = 0xFF5C;  ///< first character of text::kDsml, twice in it
constexpr const char* kMarkerEscape = "\\uff5c";
/// Whatever stands in JSON strings as it is, the marker's character apart. As that is not ASCII,
/// counts of it become rules; an automaton of thousands of states takes minutes.
constexpr const char* kFree = "[^\"\\\\\\u0000-\\u001f\uff5c]";

bool must_be_escaped(int64_t first, int64_t last) {
  const auto holds = [&](int64_t code) { return first <= code && code <= last; };
  return first < 0x20 || holds('"') || holds('\\');
}

/// One character or escape of a pattern.
struct Unit {
  std::string text;       ///< in ASCII
  int64_t code = -1;      ///< the character; -1: a class
  bool negative = false;  ///< \S, \W, \D
  bool safe = false;      ///< \w, \d: nothing that JSON must escape
};

class PatternReader {
 public:
  PatternReader(std::string_view pattern, bool in_markup, const std::string& where)
      : rest_(pattern), in_markup_(in_markup), where_(where) {}

  JsonPattern read() {
    while (!rest_.empty()) {
      if (rest_.front() == '[') {
        read_class();
        continue;
      }
      const bool any = rest_.front() == '.';
      const Unit unit = next();
      add(unit.code, unit.code, any || (unit.code < 0 && !unit.safe));
      if (in_markup_ && any) {
        out_ += concat("[^", kMarkerEscape, "]");
      } else if (in_markup_ && unit.negative) {
        const char kind = static_cast<char>(std::tolower(unit.text[1]));
        out_ += concat("[^\\", std::string(1, kind), kMarkerEscape, "]");
      } else {
        check_marker(unit.code == kMarker);
        out_ += unit.text;
      }
    }
    return {.text = std::move(out_), .plain = plain_};
  }

 private:
  void add(int64_t first, int64_t last, bool is_class) {
    plain_ = plain_ && !is_class && (last < 0 || !must_be_escaped(first, last));
  }
  void check_marker(bool matches) const {
    HADAL_INPUT_CHECK(!in_markup_ || !matches, where_,
                      ": a pattern that matches U+FF5C is not supported in tool calls");
  }

  void read_class() {
    rest_.remove_prefix(1);
    const bool negated = rest_.starts_with('^');
    if (negated) rest_.remove_prefix(1);
    std::string members;
    bool negative = false, marker = false, range = false;
    plain_ = plain_ && !negated;
    int64_t last = -1;
    while (!rest_.empty() && rest_.front() != ']') {
      const bool dash =
          rest_.front() == '-' && last >= 0 && !range && rest_.size() > 1 && rest_[1] != ']';
      const Unit unit = next();
      members += unit.text;
      if (dash) {
        range = true;
        continue;
      }
      negative = negative || unit.negative;
      marker = marker || unit.code == kMarker || (range && last <= kMarker && unit.code >= kMarker);
      add(range ? last : unit.code, unit.code, unit.code < 0 && !unit.safe);
      last = range ? -1 : unit.code;
      range = false;
    }
    if (!rest_.empty()) rest_.remove_prefix(1);
    if (in_markup_ && !negated) {
      // The usual ways to say "anything".
      if (members == "\\s\\S" || members == "\\d\\D" || members == "\\w\\W") {
        out_ += concat("[^", kMarkerEscape, "]");
        return;
      }
      check_marker(negative || marker);
    }
    out_ += concat(negated ? "[^" : "[", members, in_markup_ && negated ? kMarkerEscape : "", "]");
  }

  Unit next() {
    if (rest_.front() != '\\' || rest_.size() < 2) return character();
    rest_.remove_prefix(1);
    const char kind = rest_.front();
    if (static_cast<uint8_t>(kind) >= 0x80) return character();
    rest_.remove_prefix(1);
    Unit unit{.text = {'\\', kind}, .code = static_cast<uint8_t>(kind)};
    if (std::string_view("swdSWD").find(kind) != std::string_view::npos) {
      unit.code = -1;
      unit.negative = kind == 'S' || kind == 'W' || kind == 'D';
      unit.safe = kind == 'w' || kind == 'd';
    } else if (std::string_view("ntrfvbc0").find(kind) != std::string_view::npos) {
      unit.code = 0;  // some control character
    } else if (kind == 'u' || kind == 'x' || kind == 'U') {
      const bool braced = rest_.starts_with('{');
      const size_t digits = braced ? rest_.find('}') + 1 : kind == 'u' ? 4 : kind == 'x' ? 2 : 8;
      const std::string_view text = rest_.substr(0, digits);
      unit.text += text;
      unit.code = hexadecimal(braced && !text.empty() ? text.substr(1, text.size() - 2) : text);
      rest_.remove_prefix(text.size());
    }
    return unit;
  }

  int64_t hexadecimal(std::string_view digits) const {
    int64_t code = 0;
    for (const char c : digits) {
      HADAL_INPUT_CHECK(std::isxdigit(static_cast<unsigned char>(c)) != 0 && code <= 0x10FFFF,
                        where_, ": a pattern with a broken escape");
      code = code * 16 + (c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
    }
    return code;
  }

  /// The text is UTF-8: it came out of JSON.
  Unit character() {
    const auto first = static_cast<uint8_t>(rest_.front());
    const size_t size = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    if (size == 1) {
      rest_.remove_prefix(1);
      return {.text = {static_cast<char>(first)}, .code = first};
    }
    int64_t code = first & (0xFF >> (size + 1));
    for (size_t i = 1; i < std::min(size, rest_.size()); ++i)
      code = code << 6 | (static_cast<uint8_t>(rest_[i]) & 0x3F);
    rest_.remove_prefix(std::min(size, rest_.size()));
    std::array<char, 16> escape{};
    std::snprintf(escape.data(), escape.size(), "\\u{%x}", static_cast<unsigned>(code));
    return {.text = escape.data(), .code = code};
  }

  std::string_view rest_;
  const bool in_markup_;
  const std::string& where_;
  std::string out_;
  bool plain_ = true;
};

/// A pattern that xgrammar keeps free of what JSON must escape.
std::string checked_pattern(std::string_view pattern, bool in_markup, const std::string& where) {
  JsonPattern put = json_pattern(pattern, in_markup, where);
  if (put.plain) return std::string(pattern);  // rules count to thousands, automata do not
  const Json schema{{"type", "string"}, {"pattern", put.text}};
  const std::string rules = xgrammar::Grammar::FromJSONSchema(schema.dump()).ToString();
  HADAL_INPUT_CHECK(rules.find("\nroot_1 ::= Regex(") != std::string::npos, where, ": the pattern ",
                    pattern, " is too large or wants what JSON must escape");
  return std::move(put.text);
}

std::string length_pattern(const Json& schema) {
  const std::string least = schema.contains("minLength") ? schema["minLength"].dump() : "0";
  const std::string most = schema.contains("maxLength") ? schema["maxLength"].dump() : "";
  return concat("^", kFree, "{", least, ",", most, "}$");
}

bool prepare_pattern(Json& schema, bool in_markup, const std::string& where) {
  if (schema.contains("pattern") && schema["pattern"].is_string()) {
    const auto pattern = schema["pattern"].get<std::string>();
    const std::string put = checked_pattern(pattern, in_markup, where);
    schema["pattern"] = put;
    return put != pattern;
  }
  const bool bounded = schema.contains("minLength") || schema.contains("maxLength");
  if (!in_markup || !bounded || schema.contains("format")) return false;
  schema["pattern"] = length_pattern(schema);
  schema.erase("minLength");
  schema.erase("maxLength");
  return true;
}

}  // namespace

JsonPattern json_pattern(std::string_view pattern, bool in_markup, const std::string& where) {
  return PatternReader(pattern, in_markup, where).read();
}

bool prepare_strings(Json& schema, bool in_markup, const std::string& where) {
  if (!schema.is_object()) return false;
  bool changed = prepare_pattern(schema, in_markup, where);
  for (auto& [key, value] : schema.items()) {
    const bool names = key == "patternProperties";
    if ((names || key == "properties" || key == "$defs" || key == "definitions") &&
        value.is_object()) {
      Json members = Json::object();
      for (auto& [name, member] : value.items()) {
        const std::string put = names ? checked_pattern(name, in_markup, where) : name;
        changed = prepare_strings(member, in_markup, where) || put != name || changed;
        members[put] = std::move(member);
      }
      value = std::move(members);
    } else if (key == "items" || key == "additionalProperties" || key == "unevaluatedProperties" ||
               key == "propertyNames") {
      changed = prepare_strings(value, in_markup, where) || changed;
    } else if ((key == "prefixItems" || key == "anyOf" || key == "oneOf" || key == "allOf") &&
               value.is_array()) {
      for (Json& one : value) changed = prepare_strings(one, in_markup, where) || changed;
    }
  }
  return changed;
}

}  // namespace hadal::engine
