#include "engine_core/grammar/grammar_lark.h"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine_core/grammar/grammar_regex.h"
#include "text/utf8.h"

namespace hadal::engine_core {
namespace {

constexpr int kDeepestRule = 64;

/// lark's common terminals, as regular expressions.
struct Common {
  std::string_view name, pattern;
};
constexpr std::array<Common, 24> kCommon = {{
    {"DIGIT", "[0-9]"},
    {"HEXDIGIT", "[a-fA-F0-9]"},
    {"INT", "[0-9]+"},
    {"SIGNED_INT", "[+-]?[0-9]+"},
    {"DECIMAL", "[0-9]+\\.[0-9]*|\\.[0-9]+"},
    {"FLOAT", "[0-9]+[eE][+-]?[0-9]+|([0-9]+\\.[0-9]*|\\.[0-9]+)([eE][+-]?[0-9]+)?"},
    {"SIGNED_FLOAT", "[+-]?([0-9]+[eE][+-]?[0-9]+|([0-9]+\\.[0-9]*|\\.[0-9]+)([eE][+-]?[0-9]+)?)"},
    {"NUMBER", "[0-9]+|[0-9]+[eE][+-]?[0-9]+|([0-9]+\\.[0-9]*|\\.[0-9]+)([eE][+-]?[0-9]+)?"},
    {"SIGNED_NUMBER",
     "[+-]?([0-9]+|[0-9]+[eE][+-]?[0-9]+|([0-9]+\\.[0-9]*|\\.[0-9]+)([eE][+-]?[0-9]+)?)"},
    {"ESCAPED_STRING", "\"([^\"\\\\\\n]|\\\\[^\\n])*\""},
    {"LCASE_LETTER", "[a-z]"},
    {"UCASE_LETTER", "[A-Z]"},
    {"LETTER", "[a-zA-Z]"},
    {"WORD", "[a-zA-Z]+"},
    {"CNAME", "[_a-zA-Z][_a-zA-Z0-9]*"},
    {"WS_INLINE", "[ \\t]+"},
    {"WS", "[ \\t\\f\\r\\n]+"},
    {"CR", "\\r"},
    {"LF", "\\n"},
    {"NEWLINE", "(\\r?\\n)+"},
    {"SH_COMMENT", "#[^\\n]*"},
    {"CPP_COMMENT", "//[^\\n]*"},
    {"C_COMMENT", "/\\*([^*]|\\*+[^*/])*\\*+/"},
    {"SQL_COMMENT", "--[^\\n]*"},
}};

bool is_upper(char c) { return c >= 'A' && c <= 'Z'; }
bool is_lower(char c) { return c >= 'a' && c <= 'z'; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_rule_name(char c) { return is_upper(c) || is_lower(c) || is_digit(c) || c == '_'; }

bool is_terminal(std::string_view name) {
  const auto letter = std::ranges::find_if(name, [](char c) { return is_upper(c) || is_lower(c); });
  return letter != name.end() && is_upper(*letter);
}
std::string rule_of(std::string_view name) { return concat(is_terminal(name) ? "t_" : "r_", name); }

class Lark {
 public:
  Lark(std::string_view grammar, const std::string& where) : rest_(grammar), where_(where) {}

  std::string read() {
    for (skip_blank(true); !rest_.empty(); skip_blank(true)) {
      if (rest_.front() == '%') {
        read_directive();
      } else {
        read_definition();
      }
      skip_blank(false);
      check(rest_.empty() || rest_.front() == '\n', concat("'", shown(), "' is not understood"));
    }
    check(rules_.contains("r_start"), "there is no rule `start`");
    for (const auto& [name, line] : used_)
      HADAL_INPUT_CHECK(rules_.contains(rule_of(name)), where_, ": lark grammar, line ", line,
                        ": '", name, "' is not defined");
    std::string ignored, out;
    for (const std::string& one : ignores_)
      ignored += concat(ignored.empty() ? "" : " | ", repeated(one));
    // Of one class, it is written where it may stand: automata cost less than rules.
    const bool is_class = ignores_.size() == 1 && ignored.starts_with('[');
    if (is_class) {
      ignored = concat(" ", ignored, "*");
    } else if (!ignored.empty()) {
      out = concat("ignored ::= (", ignored, ")*\n");
      ignored = " ignored";
    }
    out += concat("root ::=", ignored, " r_start\n");
    for (auto& [name, rule] : rules_) {
      std::string text = rule;
      // Known at the end only: what may stand between terminals.
      for (size_t at = text.find('\x02'); at != std::string::npos; at = text.find('\x02', at))
        text.replace(at, 1, ignored);
      out += concat(name, " ::= ", text, "\n");
    }
    return out;
  }

 private:
  void check(bool ok, std::string_view problem) const {
    HADAL_INPUT_CHECK(ok, where_, ": lark grammar, line ", line_, ": ", problem);
  }
  std::string shown() const {
    return text::repair_utf8(rest_.substr(0, std::min<size_t>(rest_.find('\n'), 24)));
  }

  /// Spaces and comments; with `lines`, newlines, too.
  void skip_blank(bool lines) {
    while (!rest_.empty()) {
      const char c = rest_.front();
      if (c == '#' || rest_.starts_with("//")) {
        rest_.remove_prefix(std::min(rest_.find('\n'), rest_.size()));
      } else if (c == ' ' || c == '\t' || c == '\r' || (lines && c == '\n')) {
        line_ += c == '\n' ? 1 : 0;
        rest_.remove_prefix(1);
      } else {
        return;
      }
    }
  }
  /// A line that begins with | goes on with the one before; in brackets every line does.
  void skip_to_more(int depth) {
    skip_blank(depth > 0);
    const auto before = std::pair(rest_, line_);
    skip_blank(true);
    if (!rest_.starts_with('|')) std::tie(rest_, line_) = before;
  }
  bool take(std::string_view text) {
    if (!rest_.starts_with(text)) return false;
    rest_.remove_prefix(text.size());
    return true;
  }
  std::string_view take_name() {
    const size_t size = std::ranges::find_if_not(rest_, is_rule_name) - rest_.begin();
    const std::string_view name = rest_.substr(0, size);
    check(size > 0 && !is_digit(name.front()),
          concat("a name was expected before '", shown(), "'"));
    rest_.remove_prefix(size);
    return name;
  }
  int64_t take_number() {
    const size_t size = std::ranges::find_if_not(rest_, is_digit) - rest_.begin();
    check(size > 0 && size < 6, concat("a number was expected before '", shown(), "'"));
    const int64_t number = std::stoll(std::string(rest_.substr(0, size)));
    rest_.remove_prefix(size);
    return number;
  }

  void define(std::string_view name, std::string rule) {
    check(rules_.emplace(rule_of(name), std::move(rule)).second,
          concat("'", name, "' is defined twice"));
  }

  /// What may come any number of times: of `[ ]+` one is as good, and takes one way to be matched.
  std::string repeated(const std::string& expression, int depth = 0) const {
    std::string_view text = expression;
    while (text.starts_with('(') && text.ends_with(')')) text = text.substr(1, text.size() - 2);
    // A terminal may name another, or itself.
    const auto rule = rules_.find(std::string(text));
    if (rule != rules_.end() && depth < kDeepestRule) return repeated(rule->second, depth + 1);
    const bool is_run = text.starts_with('[') && text.find(']') + 2 == text.size() &&
                        (text.ends_with('+') || text.ends_with('*'));
    return is_run ? std::string(text.substr(0, text.size() - 1)) : expression;
  }

  void read_definition() {
    // How a tree is made of it.
    while (take("?") || take("!")) continue;
    const std::string_view name = take_name();
    check(std::ranges::none_of(name, is_terminal(name) ? is_lower : is_upper),
          concat("'", name, "' is neither in small nor in capital letters"));
    check(!rest_.starts_with('{') && !rest_.starts_with('['),
          concat("'", name, "': templates and captures are not supported"));
    skip_blank(false);
    if (take(".")) {  // which of two trees
      take("-");
      take_number();
      skip_blank(false);
    }
    check(take(":"), concat("a : was expected before '", shown(), "'"));
    in_terminal_ = is_terminal(name);
    define(name, alternatives(0));
  }

  void read_directive() {
    rest_.remove_prefix(1);
    const std::string directive = concat("%", take_name());
    skip_blank(false);
    if (directive == "%ignore") {
      in_terminal_ = true;
      ignores_.push_back(alternatives(0));
    } else if (directive == "%import") {
      read_import();
    } else {
      check(false, concat("'", directive, "' is not supported"));
    }
  }

  void read_import() {
    check(take("common"), "only lark's `common` terminals can be imported");
    skip_blank(false);
    if (take("(")) {
      do {
        skip_blank(true);
        const std::string_view name = take_name();
        import(name, name);
        skip_blank(true);
      } while (take(","));
      check(take(")"), concat("a ) was expected before '", shown(), "'"));
      return;
    }
    check(take("."), concat("a . was expected before '", shown(), "'"));
    const std::string_view name = take_name();
    skip_blank(false);
    std::string_view as = name;
    if (take("->")) {
      skip_blank(false);
      as = take_name();
    }
    import(name, as);
  }
  void import(std::string_view name, std::string_view as) {
    const auto known = std::ranges::find(kCommon, name, &Common::name);
    check(known != kCommon.end(), concat("'common.", name, "' is not known"));
    check(is_terminal(as), concat("'", as, "' is no name of a terminal"));
    define(as, regex_expression(known->pattern, false, where_));
  }

  std::string alternatives(int depth) {
    check(depth < kDeepestRule, concat("more than ", kDeepestRule, " levels of brackets"));
    skip_to_more(depth);  // a | in front leaves nothing as the first choice
    std::string out = concat("(", sequence(depth));
    for (skip_to_more(depth); take("|"); skip_to_more(depth)) out += concat(" | ", sequence(depth));
    return out + ")";
  }

  std::string sequence(int depth) {
    std::string out;
    for (skip_blank(depth > 0); begins_item(); skip_blank(depth > 0)) {
      const std::string one = item(depth);
      skip_blank(depth > 0);
      out += concat(out.empty() ? "" : " ", one, count());
    }
    if (take("->")) {  // what the tree calls it
      skip_blank(false);
      take_name();
    }
    return out.empty() ? "\"\"" : out;
  }
  bool begins_item() const {
    if (rest_.empty()) return false;
    const char c = rest_.front();
    return is_rule_name(c) || c == '"' || c == '/' || c == '(' || c == '[';
  }

  std::string item(int depth) {
    const bool optional = rest_.starts_with('[');
    if (optional || rest_.starts_with('(')) {
      rest_.remove_prefix(1);
      const std::string out = alternatives(depth + 1);
      skip_blank(true);
      check(take(optional ? "]" : ")"), concat("a bracket has no end before '", shown(), "'"));
      return optional ? concat("(", out, ")?") : out;
    }
    if (rest_.starts_with('"')) return spaced(literal());
    if (rest_.starts_with('/')) return spaced(regex());
    const std::string_view name = take_name();
    check(!rest_.starts_with('{'), "templates are not supported");
    check(!in_terminal_ || is_terminal(name),
          concat("the rule '", name, "' cannot be a part of a terminal"));
    used_.emplace(std::string(name), line_);
    const std::string out = rule_of(name);
    return is_terminal(name) ? spaced(out) : out;
  }
  /// What is ignored may follow a terminal.
  std::string spaced(std::string text) const {
    return in_terminal_ ? text : concat("(", text, "\x02)");
  }

  std::string count() {
    for (const std::string_view one : {"*", "+", "?"})
      if (take(one)) return std::string(one);
    if (!take("~")) return {};
    skip_blank(false);
    const int64_t least = take_number();
    skip_blank(false);
    int64_t most = least;
    if (take("..")) {
      skip_blank(false);
      most = take_number();
    }
    check(least <= most && most <= 10'000, "a count that goes backwards, or is too large");
    return concat("{", least, ",", most, "}");
  }

  /// "..." with its escapes; what stands behind its end is left.
  std::string quoted() {
    std::string out;
    rest_.remove_prefix(1);
    for (;;) {
      check(!rest_.empty() && rest_.front() != '\n', "a literal has no end");
      if (take("\"")) return out;
      if (!take("\\")) {
        out += rest_.front();
        rest_.remove_prefix(1);
        continue;
      }
      check(!rest_.empty(), "a literal has no end");
      const char kind = rest_.front();
      rest_.remove_prefix(1);
      constexpr std::string_view kKinds = "ntrfvab0\\\"'/", kValues("\n\t\r\f\v\a\b\0\\\"'/", 12);
      const size_t digits = kind == 'x' ? 2 : kind == 'u' ? 4 : kind == 'U' ? 8 : 0;
      if (digits > 0) {
        const std::string code(rest_.substr(0, digits));
        const bool whole = code.size() == digits && std::ranges::all_of(code, [](char c) {
                             return is_digit(c) || ((c | 0x20) >= 'a' && (c | 0x20) <= 'f');
                           });
        check(whole, "a broken escape in a literal");
        text::append_utf8(out, static_cast<char32_t>(std::stoul(code, nullptr, 16)));
        rest_.remove_prefix(digits);
        continue;
      }
      const size_t at = kKinds.find(kind);
      check(at != std::string_view::npos,
            concat("\\", std::string(1, kind), " in a literal is not supported"));
      out += kValues[at];
    }
  }

  std::string literal() {
    const std::string text = quoted();
    const bool any_case = rest_.starts_with('i') && (rest_.size() == 1 || !is_rule_name(rest_[1]));
    if (any_case) rest_.remove_prefix(1);
    const auto before = std::pair(rest_, line_);
    skip_blank(false);
    if (!take("..")) {
      std::tie(rest_, line_) = before;
      return literal_expression(text, any_case, where_);
    }
    skip_blank(false);
    check(rest_.starts_with('"'), "a range ends with no literal");
    const uint32_t first = only_character(text), last = only_character(quoted());
    check(!any_case && first <= last, "a range that goes backwards, or has no case");
    return class_expression({{first, last}}, where_);
  }
  uint32_t only_character(const std::string& text) const {
    const auto c = text.empty() ? text::Utf8Char{} : text::decode_utf8(text, 0);
    check(c.length == text.size() && !text.empty(), "a range is between two characters");
    return static_cast<uint32_t>(c.code_point);
  }

  std::string regex() {
    rest_.remove_prefix(1);
    size_t end = 0;
    while (end < rest_.size() && rest_[end] != '/' && rest_[end] != '\n')
      end += rest_[end] == '\\' ? 2 : 1;
    check(end < rest_.size() && rest_[end] == '/', "a regular expression has no end");
    const std::string_view pattern = rest_.substr(0, end);
    rest_.remove_prefix(end + 1);
    bool dot_all = false;
    while (!rest_.empty() && is_lower(rest_.front())) {
      const char flag = rest_.front();
      check(flag == 's' || flag == 'u', concat("the flag '", std::string(1, flag),
                                               "' of a regular expression is not supported"));
      dot_all = dot_all || flag == 's';
      rest_.remove_prefix(1);
    }
    return regex_expression(pattern, dot_all, concat(where_, ": lark grammar, line ", line_));
  }

  std::string_view rest_;
  const std::string& where_;
  int64_t line_ = 1;
  bool in_terminal_ = false;
  std::map<std::string, std::string> rules_;
  std::vector<std::string> ignores_;
  std::map<std::string, int64_t> used_;  ///< names, and the line that first says them
};

}  // namespace

std::string lark_to_ebnf(std::string_view grammar, const std::string& where) {
  return Lark(grammar, where).read();
}

std::string regex_to_ebnf(std::string_view pattern, const std::string& where) {
  return concat("root ::= ", regex_expression(pattern, false, where), "\n");
}

}  // namespace hadal::engine_core
