#include "engine_core/grammar/grammar_regex.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <optional>

#include "base/check.h"
#include "text/utf8.h"

namespace hadal::engine_core {
namespace {

constexpr int kDeepest = 64;
constexpr int64_t kMostRepeats = 10'000;
const Ranges kNever = {{1, 1}, {0xD800, 0xDFFF}};

std::string escaped(uint32_t code) {
  const bool plain = (code >= '0' && code <= '9') || (code >= 'A' && code <= 'Z') ||
                     (code >= 'a' && code <= 'z') || code == ' ';
  if (plain) return {static_cast<char>(code)};
  std::array<char, 16> text{};
  std::snprintf(text.data(), text.size(), code <= 0xFFFF ? "\\u%04x" : "\\U%08x",
                static_cast<unsigned>(code));
  return text.data();
}

bool is_letter(uint32_t code) { return (code | 0x20) >= 'a' && (code | 0x20) <= 'z'; }

class Reader {
 public:
  Reader(std::string_view pattern, bool dot_all, const std::string& where)
      : rest_(pattern), dot_all_(dot_all), where_(where) {}

  std::string read() {
    // The whole text is matched in any case.
    if (rest_.starts_with('^')) rest_.remove_prefix(1);
    std::string out = alternatives(0);
    HADAL_INPUT_CHECK(rest_.empty(), where_, ": a ) without its ( in a regular expression");
    HADAL_INPUT_CHECK(!has_border_ || num_choices_ == 0, where_,
                      ": $ beside | in a regular expression is not supported");
    return out;
  }

 private:
  std::string alternatives(int depth) {
    HADAL_INPUT_CHECK(depth < kDeepest, where_, ": a regular expression of more than ", kDeepest,
                      " levels");
    std::string out = concat("(", sequence(depth));
    while (take('|')) {
      if (depth == 0) ++num_choices_;
      out += concat(" | ", sequence(depth));
    }
    return out + ")";
  }

  std::string sequence(int depth) {
    std::string out;
    while (!rest_.empty() && rest_.front() != '|' && rest_.front() != ')') {
      if (rest_ == "$" && depth == 0) {
        has_border_ = true;
        rest_ = {};
        break;
      }
      const std::string one = atom(depth);
      out += concat(out.empty() ? "" : " ", one, count());
    }
    return out.empty() ? "\"\"" : out;
  }

  std::string atom(int depth) {
    const char first = rest_.front();
    if (take('(')) {
      read_group();
      std::string out = alternatives(depth + 1);
      HADAL_INPUT_CHECK(take(')'), where_, ": a ( without its ) in a regular expression");
      return out;
    }
    if (take('.')) return of(dot_all_ ? complement({}) : complement({{10, 10}}));
    if (take('[')) return of(read_class());
    HADAL_INPUT_CHECK(std::string_view("^$*+?{").find(first) == std::string_view::npos, where_,
                      ": '", std::string(1, first),
                      "' at this place of a regular expression is not supported");
    return of(next(false));
  }

  void read_group() {
    if (!take('?')) return;
    if (take(':')) return;
    take('P');
    // A name for what matched changes nothing.
    const bool named = take('<') && !rest_.empty() && is_letter(static_cast<uint8_t>(rest_[0]));
    const size_t end = named ? rest_.find('>') : std::string_view::npos;
    HADAL_INPUT_CHECK(end != std::string_view::npos, where_,
                      ": look-around, flags and other (?...) of regular expressions are not "
                      "supported");
    rest_.remove_prefix(end + 1);
  }

  std::string count() {
    std::string out;
    if (take('*')) {
      out = "*";
    } else if (take('+')) {
      out = "+";
    } else if (take('?')) {
      out = "?";
    } else if (rest_.starts_with('{')) {
      const size_t end = rest_.find('}');
      HADAL_INPUT_CHECK(end != std::string_view::npos, where_,
                        ": a { without its } in a regular expression");
      out = braces(rest_.substr(1, end - 1));
      rest_.remove_prefix(end + 1);
    }
    if (out.empty()) return out;
    take('?');  // lazy: the same texts
    HADAL_INPUT_CHECK(
        rest_.empty() || std::string_view("*+?{").find(rest_[0]) == std::string_view::npos, where_,
        ": two counts in a row in a regular expression");
    return out;
  }

  std::string braces(std::string_view text) const {
    const size_t comma = text.find(',');
    const auto least = number(text.substr(0, comma));
    const bool open = comma != std::string_view::npos && comma + 1 == text.size();
    const auto most =
        comma == std::string_view::npos || open ? least : number(text.substr(comma + 1));
    HADAL_INPUT_CHECK(least && most && *least <= *most && *most <= kMostRepeats, where_,
                      ": the count {", text, "} in a regular expression is not supported");
    return open ? concat("{", *least, ",}") : concat("{", *least, ",", *most, "}");
  }

  static std::optional<int64_t> number(std::string_view text) {
    int64_t value = 0;
    const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
    if (text.empty() || end.ptr != text.data() + text.size() || value < 0) return {};
    return value;
  }

  Ranges read_class() {
    const bool negated = take('^');
    Ranges ranges;
    for (bool first = true; first || !rest_.starts_with(']'); first = false) {
      const bool sets = rest_.starts_with("[:") || rest_.starts_with("&&") ||
                        rest_.starts_with("--") || rest_.starts_with("~~");
      HADAL_INPUT_CHECK(!rest_.empty() && !sets, where_,
                        ": a class without its ], or with operators, in a regular expression");
      Ranges one = next(true);
      const bool single = one.size() == 1 && one[0].first == one[0].second;
      if (single && rest_.starts_with('-') && rest_.size() > 1 && rest_[1] != ']') {
        rest_.remove_prefix(1);
        const Ranges last = next(true);
        HADAL_INPUT_CHECK(
            last.size() == 1 && last[0].first == last[0].second && last[0].first >= one[0].first,
            where_, ": a range that goes backwards in a regular expression");
        one[0].second = last[0].second;
      }
      ranges.insert(ranges.end(), one.begin(), one.end());
    }
    rest_.remove_prefix(1);
    return negated ? complement(ranges) : normalised(ranges);
  }

  /// One character or what an escape stands for.
  Ranges next(bool in_class) {
    if (!take('\\')) return {{take_character(), last_}};
    HADAL_INPUT_CHECK(!rest_.empty(), where_, ": a regular expression ends with a backslash");
    const uint32_t kind = take_character();
    constexpr std::string_view kControls = "ntrfva0";
    constexpr std::array<uint32_t, 7> kCodes = {10, 9, 13, 12, 11, 7, 0};
    if (kind == 'd' || kind == 'w' || kind == 's' || kind == 'D' || kind == 'W' || kind == 'S')
      return letter_class(static_cast<char>(kind));
    if (kind == 'b' && in_class) return {{8, 8}};
    if (kind == 'x' || kind == 'u' || kind == 'U') return coded(static_cast<char>(kind));
    if (const size_t at = kind < 128 ? kControls.find(static_cast<char>(kind)) : std::string::npos;
        at != std::string_view::npos)
      return {{kCodes[at], kCodes[at]}};
    HADAL_INPUT_CHECK(!is_letter(kind) && !(kind >= '0' && kind <= '9'), where_, ": \\",
                      std::string(1, static_cast<char>(kind)),
                      " in a regular expression is not supported");
    return {{kind, kind}};
  }

  Ranges coded(char kind) {
    const bool braced = take('{');
    const size_t digits = braced ? rest_.find('}') : kind == 'x' ? 2 : kind == 'u' ? 4 : 8;
    uint32_t code = 0;
    const bool there = digits != std::string_view::npos && digits > 0 && digits <= rest_.size();
    const std::string_view text = there ? rest_.substr(0, digits) : std::string_view();
    const auto end = std::from_chars(text.data(), text.data() + text.size(), code, 16);
    HADAL_INPUT_CHECK(there && end.ptr == text.data() + text.size() && code <= kLastCharacter,
                      where_, ": a broken escape in a regular expression");
    rest_.remove_prefix(digits + (braced ? 1 : 0));
    return {{code, code}};
  }

  uint32_t take_character() {
    const text::Utf8Char c = text::decode_utf8(rest_, 0);
    rest_.remove_prefix(c.length);
    return last_ = static_cast<uint32_t>(c.code_point);
  }
  bool take(char c) {
    if (!rest_.starts_with(c)) return false;
    rest_.remove_prefix(1);
    return true;
  }
  std::string of(const Ranges& ranges) const { return class_expression(ranges, where_); }

  std::string_view rest_;
  const bool dot_all_;
  const std::string& where_;
  uint32_t last_ = 0;
  int num_choices_ = 0;
  bool has_border_ = false;
};

}  // namespace

std::string class_expression(const Ranges& ranges, const std::string& where) {
  const Ranges some = without(ranges, kNever);
  HADAL_INPUT_CHECK(!some.empty(), where, ": a class that matches no character");
  // What is left out of it may be shorter; surrogates need not be said.
  const Ranges others = without(complement(some), kSurrogates);
  const bool negated = others.size() < some.size();
  std::string out = negated ? "[^" : "[";
  for (const auto& [first, last] : negated ? others : some) {
    out += escaped(first);
    if (last > first) out += concat("-", escaped(last));
  }
  return out + "]";
}

std::string literal_expression(std::string_view text, bool any_case, const std::string& where) {
  std::string out, run;
  const auto end_run = [&] {
    if (!run.empty()) out += concat(out.empty() ? "" : " ", "\"", run, "\"");
    run.clear();
  };
  for (size_t pos = 0; pos < text.size();) {
    const text::Utf8Char c = text::decode_utf8(text, pos);
    pos += c.length;
    const auto code = static_cast<uint32_t>(c.code_point);
    HADAL_INPUT_CHECK(code != 1, where, ": U+0001 cannot stand in a call");
    HADAL_INPUT_CHECK(!any_case || code < 128, where,
                      ": a literal without case can only hold ASCII");
    if (any_case && is_letter(code)) {
      end_run();
      const uint32_t lower = code | 0x20, upper = lower - 0x20;
      out +=
          concat(out.empty() ? "" : " ", class_expression({{upper, upper}, {lower, lower}}, where));
    } else {
      run += escaped(code);
    }
  }
  end_run();
  return out.empty() ? "\"\"" : concat("(", out, ")");
}

std::string regex_expression(std::string_view pattern, bool dot_all, const std::string& where) {
  return Reader(pattern, dot_all, where).read();
}

}  // namespace hadal::engine_core
