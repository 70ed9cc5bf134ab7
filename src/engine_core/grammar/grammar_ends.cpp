#include "engine_core/grammar/grammar_ends.h"

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine_core/grammar/grammar_pattern.h"

namespace hadal::engine_core {
namespace {

/// What a text needs to be matched: a rule, all of some parts, one of them, or nothing that could
/// fail; or it cannot be.
struct Node {
  enum class Kind : uint8_t { kFree, kNever, kRule, kAll, kOne };
  Kind kind = Kind::kFree;
  size_t rule = 0;
  std::vector<Node> parts;
};

struct Rule {
  std::string name, body;
  Node node;
  bool ends = false;
};

bool is_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
         c == '-' || c == '.';
}

class BodyReader {
 public:
  BodyReader(std::string_view text, const std::map<std::string, size_t, std::less<>>& rules)
      : rest_(text), rules_(rules) {}

  Node read() {
    Node one{Node::Kind::kOne, 0, {}};
    Node all{Node::Kind::kAll, 0, {}};
    for (skip(); !rest_.empty() && rest_.front() != ')'; skip()) {
      if (rest_.front() == '|') {
        rest_.remove_prefix(1);
        one.parts.push_back(std::exchange(all, {Node::Kind::kAll, 0, {}}));
      } else if (rest_.starts_with("(=")) {
        break;  // what follows is only looked at
      } else {
        all.parts.push_back(repeated(element()));
      }
    }
    one.parts.push_back(std::move(all));
    return one;
  }

 private:
  void skip() {
    while (!rest_.empty() && (rest_.front() == ' ' || rest_.front() == '\n'))
      rest_.remove_prefix(1);
  }

  /// Takes a text up to its closing mark, past escaped characters.
  std::string_view quoted(char end) {
    size_t pos = 1;
    while (pos < rest_.size() && rest_[pos] != end) pos += rest_[pos] == '\\' ? 2 : 1;
    const std::string_view text = rest_.substr(0, pos + 1);
    rest_.remove_prefix(std::min(pos + 1, rest_.size()));
    return text;
  }

  static bool can_match(std::string_view text) {
    try {
      json_pattern(text, "");
    } catch (const InputError&) {
      return false;
    }
    return true;
  }

  Node element() {
    const char c = rest_.front();
    if (c == '(') {
      rest_.remove_prefix(1);
      Node node = read();
      if (!rest_.empty()) rest_.remove_prefix(1);
      return node;
    }
    if (c == '"') {
      // Half a surrogate pair is no character.
      const std::string_view text = quoted('"');
      const bool surrogate = text.find("\\ud8") != std::string_view::npos && !can_match(text);
      return {surrogate ? Node::Kind::kNever : Node::Kind::kFree, 0, {}};
    }
    if (c == '[') return {can_match(quoted(']')) ? Node::Kind::kFree : Node::Kind::kNever, 0, {}};
    size_t size = 0;
    while (size < rest_.size() && is_name(rest_[size])) ++size;
    if (size == 0) {
      rest_.remove_prefix(1);
      return {};
    }
    const std::string_view name = rest_.substr(0, size);
    rest_.remove_prefix(size);
    if (rest_.starts_with('(')) {  // Regex(...), TagDispatch(...), Token(...)
      int depth = 0;
      do {
        if (rest_.front() == '"') {
          quoted('"');
          continue;
        }
        if (rest_.front() == '(') ++depth;
        if (rest_.front() == ')') --depth;
        rest_.remove_prefix(1);
      } while (depth > 0 && !rest_.empty());
      return {};
    }
    const auto found = rules_.find(name);
    return found == rules_.end() ? Node{} : Node{Node::Kind::kRule, found->second, {}};
  }

  /// An element that may be left out needs nothing.
  Node repeated(Node node) {
    if (rest_.empty()) return node;
    const char c = rest_.front();
    bool may_lack = c == '*' || c == '?';
    if (c == '*' || c == '?' || c == '+') rest_.remove_prefix(1);
    if (c == '{') {
      may_lack = rest_.size() > 1 && rest_[1] == '0' && (rest_.size() < 3 || !is_name(rest_[2]));
      quoted('}');
    }
    return may_lack ? Node{} : node;
  }

  std::string_view rest_;
  const std::map<std::string, size_t, std::less<>>& rules_;
};

bool ends(const Node& node, const std::vector<Rule>& rules) {
  switch (node.kind) {
    case Node::Kind::kFree:
      return true;
    case Node::Kind::kNever:
      return false;
    case Node::Kind::kRule:
      return rules[node.rule].ends;
    case Node::Kind::kAll:
      for (const Node& part : node.parts) {
        if (!ends(part, rules)) return false;
      }
      return true;
    case Node::Kind::kOne:
      break;
  }
  for (const Node& part : node.parts) {
    if (ends(part, rules)) return true;
  }
  return false;
}

/// A rule without an end that this one needs; none: it needs what cannot be.
const size_t* endless_below(const Node& node, const std::vector<Rule>& rules) {
  if (node.kind == Node::Kind::kRule) return rules[node.rule].ends ? nullptr : &node.rule;
  for (const Node& part : node.parts) {
    if (const size_t* found = endless_below(part, rules)) return found;
  }
  return nullptr;
}

}  // namespace

void check_ends(std::string_view grammar, std::string_view where) {
  std::vector<Rule> rules;
  std::map<std::string, size_t, std::less<>> places;
  while (!grammar.empty()) {
    const size_t end = std::min(grammar.find('\n'), grammar.size());
    const std::string_view line = grammar.substr(0, end);
    grammar.remove_prefix(std::min(end + 1, grammar.size()));
    const size_t split = line.find(" ::= ");
    if (split == std::string_view::npos) continue;
    places.emplace(line.substr(0, split), rules.size());
    rules.push_back(
        {std::string(line.substr(0, split)), std::string(line.substr(split + 5)), {}, false});
  }
  for (Rule& rule : rules) rule.node = BodyReader(rule.body, places).read();
  // What a rule needs mostly stands behind it.
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t i = rules.size(); i-- > 0;) {
      if (rules[i].ends || !ends(rules[i].node, rules)) continue;
      rules[i].ends = changed = true;
    }
  }
  const auto root = places.find("root");
  if (root == places.end() || rules[root->second].ends) return;
  std::set<size_t> seen;
  size_t rule = root->second;
  for (const size_t* next = &rule; next != nullptr && seen.insert(*next).second;
       next = endless_below(rules[rule].node, rules))
    rule = *next;
  throw InputError(concat(where, ": the rule ", rules[rule].name,
                          " has no end: it always needs itself, or what no text can be"));
}

}  // namespace hadal::engine_core
