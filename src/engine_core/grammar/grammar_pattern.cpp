#include "engine_core/grammar/grammar_pattern.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "engine_core/grammar/char_ranges.h"

namespace hadal::engine_core {
namespace {

using Json = nlohmann::ordered_json;

const Ranges kEscaped = {{0, 0x1F}, {'"', '"'}, {'\\', '\\'}};  ///< in JSON

std::string character(uint32_t code) {
  const bool plain = (code >= '0' && code <= '9') || (code >= 'A' && code <= 'Z') ||
                     (code >= 'a' && code <= 'z') || code == ' ';
  if (plain) return {static_cast<char>(code)};
  std::array<char, 16> escape{};
  std::snprintf(escape.data(), escape.size(), code <= 0xFFFF ? "\\u%04x" : "\\u{%x}",
                static_cast<unsigned>(code));
  return escape.data();
}

std::string members(const Ranges& ranges) {
  std::string out;
  for (const auto& [first, last] : ranges) {
    out += character(first);
    if (last > first) out += concat("-", character(last));
  }
  return out;
}

/// A class of characters, written the shorter way.
std::string char_class(const Ranges& ranges) {
  const Ranges others = without(complement(ranges), kSurrogates);
  if (others.empty()) return "[^\\u0000]";  // cannot be: JSON strings hold no U+0000
  return others.size() < ranges.size() ? concat("[^", members(others), "]")
                                       : concat("[", members(ranges), "]");
}

/// The escapes of those characters that JSON must escape; the brackets around the backslash tell
/// xgrammar not to leave them out (cmake/xgrammar/json_schema_converter.cc.mend).
std::string escapes(const Ranges& ranges) {
  constexpr std::array<std::pair<uint32_t, const char*>, 7> kShort = {
      {{'"', "\""}, {'\\', "\\\\"}, {8, "b"}, {12, "f"}, {10, "n"}, {13, "r"}, {9, "t"}}};
  std::string letters, codes;
  for (const auto& [code, letter] : kShort) {
    if (holds(ranges, code)) letters += letter;
  }
  for (const auto& range : kEscaped) {
    for (uint32_t code = range.first; code <= range.second; ++code) {
      if (!holds(ranges, code)) continue;
      std::array<char, 24> text{};
      const uint32_t low = code % 16;
      if (low < 10) {
        std::snprintf(text.data(), text.size(), "%x%x", code / 16, low);
      } else {
        std::snprintf(text.data(), text.size(), "%x[%x%X]", code / 16, low, low);
      }
      codes += concat(codes.empty() ? "" : "|", text.data());
    }
  }
  const std::string unicode = concat("u00(", codes, ")");
  return concat("[\\\\](", letters.empty() ? "" : concat("[", letters, "]|"), unicode, ")");
}

/// One character or class of a pattern, or what is none (an operator).
struct Unit {
  std::string text;  ///< as it was, in ASCII
  Ranges ranges;     ///< empty: an operator
};

class PatternReader {
 public:
  PatternReader(std::string_view pattern, const std::string& where)
      : rest_(pattern), where_(where) {}

  JsonPattern read() {
    while (!rest_.empty()) {
      if (rest_.front() == '[') {
        put(read_class());
      } else if (rest_.front() == '.') {
        rest_.remove_prefix(1);
        put({".", complement({{10, 10}, {13, 13}})});
      } else if (rest_.front() == '{') {
        // A count is no text; neither is what names a group.
        const size_t end = std::min(rest_.find('}'), rest_.size() - 1);
        put({std::string(rest_.substr(0, end + 1)), {}});
        rest_.remove_prefix(end + 1);
      } else if (std::string_view("()|*+?^$").find(rest_.front()) != std::string_view::npos) {
        put({std::string(1, rest_.front()), {}});
        rest_.remove_prefix(1);
      } else {
        put(next());
      }
    }
    return {.text = std::move(out_), .plain = plain_};
  }

 private:
  void put(const Unit& unit) {
    const Ranges plain = without(unit.ranges, kEscaped);
    const Ranges escaped = without(unit.ranges, complement(kEscaped));
    if (escaped.empty()) {
      out_ += unit.text;
      return;
    }
    plain_ = false;
    const std::string rest = plain.empty() ? "" : concat(char_class(plain), "|");
    out_ += concat("(", rest, escapes(escaped), ")");
  }

  Unit read_class() {
    const std::string_view begin = rest_;
    rest_.remove_prefix(1);
    const bool negated = rest_.starts_with('^');
    if (negated) rest_.remove_prefix(1);
    in_class_ = true;
    Ranges ranges;
    std::string text = negated ? "[^" : "[";
    while (!rest_.empty() && rest_.front() != ']') {
      Unit unit = next();
      text += unit.text;
      const bool single = unit.ranges.size() == 1 && unit.ranges[0].first == unit.ranges[0].second;
      if (single && rest_.starts_with('-') && rest_.size() > 1 && rest_[1] != ']') {
        rest_.remove_prefix(1);
        const Unit last = next();
        text += concat("-", last.text);
        HADAL_INPUT_CHECK(!last.ranges.empty() && last.ranges.back().second >= unit.ranges[0].first,
                          where_, ": a pattern with a range that goes backwards");
        unit.ranges[0].second = last.ranges.back().second;
      }
      ranges.insert(ranges.end(), unit.ranges.begin(), unit.ranges.end());
    }
    if (!rest_.empty()) rest_.remove_prefix(1);
    in_class_ = false;
    ranges = negated ? complement(ranges) : normalised(ranges);
    check(ranges, begin.substr(0, begin.size() - rest_.size()));
    return {text + "]", std::move(ranges)};
  }

  void check(const Ranges& ranges, std::string_view text) const {
    HADAL_INPUT_CHECK(!without(ranges, kSurrogates).empty(), where_, ": ", text,
                      " in a pattern matches no character");
  }

  Unit next() {
    if (rest_.front() != '\\' || rest_.size() < 2) return literal();
    rest_.remove_prefix(1);
    const char kind = rest_.front();
    if (static_cast<uint8_t>(kind) >= 0x80) return literal();
    rest_.remove_prefix(1);
    Unit unit{{'\\', kind}, {{static_cast<uint8_t>(kind), static_cast<uint8_t>(kind)}}};
    constexpr std::string_view kControls = "ntrfv0";
    constexpr std::array<uint32_t, 6> kCodes = {10, 9, 13, 12, 11, 0};
    if (std::string_view("swdSWD").find(kind) != std::string_view::npos) {
      unit.ranges = letter_class(kind);
    } else if (kind == 'b' && in_class_) {
      unit.ranges = {{8, 8}};
    } else if (kind == 'b' || kind == 'B') {
      unit.ranges.clear();  // a border, which xgrammar refuses
    } else if (const size_t at = kControls.find(kind); at != std::string_view::npos) {
      unit.ranges = {{kCodes[at], kCodes[at]}};
    } else if (kind == 'c' && !rest_.empty()) {
      const uint32_t code = static_cast<uint8_t>(rest_.front()) & 31;
      unit.text += rest_.front();
      unit.ranges = {{code, code}};
      rest_.remove_prefix(1);
    } else if (kind == 'u' || kind == 'x' || kind == 'U') {
      const bool braced = rest_.starts_with('{');
      const size_t digits = braced ? rest_.find('}') + 1 : kind == 'u' ? 4 : kind == 'x' ? 2 : 8;
      const std::string_view text = rest_.substr(0, digits);
      unit.text += text;
      const uint32_t code =
          hexadecimal(braced && !text.empty() ? text.substr(1, text.size() - 2) : text);
      unit.ranges = {{code, code}};
      check(unit.ranges, unit.text);
      rest_.remove_prefix(text.size());
    }
    return unit;
  }

  uint32_t hexadecimal(std::string_view digits) const {
    uint32_t code = 0;
    for (const char c : digits) {
      const bool is_digit = (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'f');
      HADAL_INPUT_CHECK(is_digit && code <= kLastCharacter, where_,
                        ": a pattern with a broken escape");
      code = code * 16 + static_cast<uint32_t>(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
    }
    HADAL_INPUT_CHECK(code <= kLastCharacter, where_, ": a pattern with a broken escape");
    return code;
  }

  /// The text is UTF-8: it came out of JSON.
  Unit literal() {
    const auto first = static_cast<uint8_t>(rest_.front());
    const size_t size = first < 0x80 ? 1 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
    uint32_t code = size == 1 ? first : first & (0xFFU >> (size + 1));
    for (size_t i = 1; i < std::min(size, rest_.size()); ++i)
      code = code << 6 | (static_cast<uint8_t>(rest_[i]) & 0x3F);
    std::string text = size == 1 ? std::string(1, rest_.front()) : character(code);
    rest_.remove_prefix(std::min(size, rest_.size()));
    return {std::move(text), {{code, code}}};
  }

  std::string_view rest_;
  const std::string& where_;
  std::string out_;
  bool plain_ = true, in_class_ = false;
};

std::string checked_pattern(std::string_view pattern, const std::string& where) {
  JsonPattern put = json_pattern(pattern, where);
  // What needs no change keeps its characters.
  return put.plain ? std::string(pattern) : std::move(put.text);
}

/// What stands for one character of a string.
constexpr const char* kAnyCharacter =
    "([^\"\\\\\\u0000-\\u001f]|[\\\\]([\"\\\\/bfnrt]|"
    "u([0-9a-cA-CefEF][0-9a-fA-F][0-9a-fA-F][0-9a-fA-F]|[dD][0-7][0-9a-fA-F][0-9a-fA-F])))";

std::string length_pattern(const Json& schema) {
  // Whole numbers, but 3.0 is one too.
  const auto bound = [&](const char* key, const char* none) {
    return schema.contains(key) ? std::to_string(schema[key].get<int64_t>()) : std::string(none);
  };
  const std::string least = bound("minLength", "0"), most = bound("maxLength", "");
  return concat("^", kAnyCharacter, "{", least, ",", most, "}$");
}

bool prepare_pattern(Json& schema, const std::string& where) {
  if (schema.contains("pattern") && schema["pattern"].is_string()) {
    const auto pattern = schema["pattern"].get<std::string>();
    const std::string put = checked_pattern(pattern, where);
    schema["pattern"] = put;
    return put != pattern;
  }
  const bool bounded = schema.contains("minLength") || schema.contains("maxLength");
  if (!bounded || schema.contains("format")) return false;
  schema["pattern"] = length_pattern(schema);
  schema.erase("minLength");
  schema.erase("maxLength");
  return true;
}

}  // namespace

JsonPattern json_pattern(std::string_view pattern, const std::string& where) {
  return PatternReader(pattern, where).read();
}

bool prepare_strings(Json& schema, const std::string& where) {
  if (!schema.is_object()) return false;
  bool changed = prepare_pattern(schema, where);
  for (auto& [key, value] : schema.items()) {
    const bool names = key == "patternProperties";
    if ((names || key == "properties" || key == "$defs" || key == "definitions") &&
        value.is_object()) {
      Json members = Json::object();
      for (auto& [name, member] : value.items()) {
        const std::string put = names ? checked_pattern(name, where) : name;
        changed = prepare_strings(member, where) || put != name || changed;
        members[put] = std::move(member);
      }
      value = std::move(members);
    } else if (key == "items" || key == "additionalProperties" || key == "unevaluatedProperties" ||
               key == "propertyNames") {
      changed = prepare_strings(value, where) || changed;
    } else if ((key == "prefixItems" || key == "anyOf" || key == "oneOf" || key == "allOf") &&
               value.is_array()) {
      for (Json& one : value) changed = prepare_strings(one, where) || changed;
    }
  }
  return changed;
}

}  // namespace hadal::engine_core
