// Custom tools' grammars: which texts a lark grammar or a regular expression takes, and that what
// cannot be kept is refused by name.
#include "engine_core/grammar/grammar_lark.h"

#include <random>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "base/check.h"
#include "engine_core/grammar/grammar.h"
#include "testing/nano_grammar.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace hadal::engine_core {
namespace {

using nlohmann::json;

using testing::nano_compiler;
using testing::nano_tokenizer;

/// Whether a forced call of a custom tool may hold this input.
bool takes(const char* syntax, const std::string& definition, const std::string& input) {
  const json tools = {
      {{"name", "t"}, {"format", {{"syntax", syntax}, {"definition", definition}}}}};
  const std::vector<text::ToolCall> calls = {{"t", json{{"input", input}}.dump()}};
  text::ChatPrompt prompt;
  prompt.text = "\n\n";
  text::write_tool_calls(calls, prompt);
  GrammarSession session(nano_compiler().compile({Grammar::Kind::kToolCalls, tools.dump(), true}),
                         false);
  for (const int32_t id : nano_tokenizer().encode(prompt.text, prompt.foreign))
    if (!session.accept(id)) return false;
  return session.completed();
}

std::string refusal(const char* syntax, const std::string& definition) {
  try {
    takes(syntax, definition, "");
  } catch (const InputError& error) {
    return error.what();
  }
  return "taken";
}

struct Case {
  std::string definition;
  std::vector<std::string> yes, no;
};

void check(const char* syntax, const std::vector<Case>& cases) {
  for (const Case& one : cases) {
    ASSERT_NO_THROW(takes(syntax, one.definition, "")) << one.definition;
    for (const std::string& text : one.yes)
      EXPECT_TRUE(takes(syntax, one.definition, text)) << one.definition << "\n" << text;
    for (const std::string& text : one.no)
      EXPECT_FALSE(takes(syntax, one.definition, text)) << one.definition << "\n" << text;
  }
}

TEST(GrammarLark, RegularExpressions) {
  check(
      "regex",
      {{R"(^\d{4}-\d{2}-\d{2}$)", {"2026-11-30"}, {"2026-11-3", "x2026-11-30", "2026-11-300", ""}},
       {R"([^a-c]+)", {"xyz", "äöü", "\"\\\n"}, {"xa", ""}},
       {R"((?:ab|cd)*?e?)", {"", "abcd", "cde", "e"}, {"abc", "ee"}},
       {R"((?P<n>a)(?<m>b))", {"ab"}, {"a"}},
       {R"([]\-x]{2,3})", {"]-", "x]-"}, {"]", "aa", "xxxx"}},
       {R"(a{2,}\.\x41\u00e9\u{1F600})", {"aa.Aé😀", "aaa.Aé😀"}, {"a.Aé😀", "aa Aé😀"}},
       {R"(.*)", {"", "any </think> text", "tab\t"}, {"a\nb"}},
       {R"(\w+\s\W)", {"ab_9 !"}, {"ab_9  !", "ab c"}},
       {R"((a|))", {"", "a"}, {"aa"}}});
}

TEST(GrammarLark, RegularExpressionsThatCannotBeKept) {
  for (const char* pattern :
       {R"((?=a)b)", R"((?!a)b)", R"((?<=a)b)", R"(\bword)", R"((a)\1)",       R"(\p{L})",
        R"((?i)a)",  R"(a$b)",    R"(^a|b$)",   R"(a**)",    R"((a)",          R"(a))",
        R"([a)",     R"([b-a])",  R"(a{3,2})",  R"(a{x})",   R"([[:alpha:]])", R"(\x4)",
        "\\",        R"(*a)",     R"([^\s\S])", R"(a++)"}) {
    const std::string problem = refusal("regex", pattern);
    EXPECT_NE(problem.find("tools: 't': format"), std::string::npos) << pattern << ": " << problem;
  }
}

TEST(GrammarLark, Grammars) {
  check("lark",
        {{R"lark(start: "a" B+ -> tree
           B: "b".."d" | /[x-z]/)lark",
          {"ab", "acdx"},
          {"a", "b", "ae"}},
         {R"lark(// arithmetic
           ?start: sum
           ?sum: product | sum "+" product   # left
           ?product: atom
                   | product "*" atom
           atom.2: NUMBER | "-" atom -> neg | "(" sum ")"
           %import common.NUMBER
           %import common.WS_INLINE
           %ignore WS_INLINE)lark",
          {"1", "1+2*3", " ( 1.5 + -2 ) * 4e3 ", "-(1)"},
          {"1+", "(1", "1 2", "1\n"}},
         {R"lark(start: [sign] DIGIT~2..3 ("x"i | "yes")?
           sign: "+" | "-"
           %import common (DIGIT, WORD))lark",
          {"12", "-123", "+12X", "12x", "123yes"},
          {"1", "1234", "12xx", "12YES"}},
         {"start: \"a\"\nA: A\n%ignore A", {"a"}, {"aa"}},
         {R"lark(start: "a"~3)lark", {"aaa"}, {"aa", "aaaa"}},
         {R"lark(start: "\"" /[^"]*/s "\"" "\n")lark", {"\"x y\"\n", "\"\n\"\n"}, {"\"x\"", "x\n"}},
         {R"lark(start: |"x" start)lark", {"", "xxx"}, {"y"}},
         {R"lark(start: STRING ("," STRING)*
           %import common.ESCAPED_STRING -> STRING)lark",
          {"\"a\"", R"("a\"b","c")"},
          {"\"a", R"("a" "b")", "a"}},
         {R"lark(start: KEY "=" /(?:on|off)/
           KEY: LETTER (LETTER | "_")*
           LETTER: /[a-z]/
           %ignore " "
           %ignore /#[^\n]*\n/)lark",
          {"k_y = on", "# c\n a=off"},
          {"k y=on", "a=o n"}}});
}

// As a coding agent sends it.
constexpr const char* kPatch = R"(start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?

hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?

filename: /(.+)/
add_line: "+" /(.*)/ LF -> line

change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
)";

TEST(GrammarLark, APatch) {
  check("lark",
        {{kPatch,
          {"*** Begin Patch\n*** Add File: a.txt\n+one\n+\n*** End Patch",
           "*** Begin Patch\n*** Update File: a\n*** Move to: b\n@@ def f():\n-x\n+y \"z\"\n z\n"
           "*** End of File\n*** Delete File: c\n*** End Patch\n"},
          {"", "*** Begin Patch\n*** End Patch",
           "*** Begin Patch\n*** Add File: a.txt\n*** End Patch",
           "*** Begin Patch\n*** Add File: a\none\n*** End Patch", "patch"}}});
}

TEST(GrammarLark, GrammarsThatCannotBeKept) {
  struct Refused {
    const char *grammar, *problem;
  };
  const std::vector<Refused> cases = {
      {"begin: \"a\"", "no rule `start`"},
      {"start: other", "line 1: 'other' is not defined"},
      {"start: \"a\"\nstart: \"b\"", "line 2: 'start' is defined twice"},
      {"start: A\nA: b\nb: \"x\"", "line 2: the rule 'b' cannot be a part of a terminal"},
      {"start: \"a", "a literal has no end"},
      {"start: /a", "a regular expression has no end"},
      {"start: /a/i", "flag 'i'"},
      {"start: /(?=a)/", "look-around"},
      {"start: (\"a\"", "a bracket has no end"},
      {"start: \"a\" \"b\")", "')' is not understood"},
      {"start: \"b\"..\"a\"", "goes backwards"},
      {"start: \"ab\"..\"c\"", "between two characters"},
      {"start: x{\"a\"}\nx{y}: y", "templates"},
      {"start: \"a\"\n%declare B", "'%declare' is not supported"},
      {"start: A\n%import python.NAME -> A", "only lark's `common`"},
      {"start: A\n%import common.MADE_UP -> A", "'common.MADE_UP' is not known"},
      {"start: start \"a\"", "start"},
      {"start: \"a\"~3..2", "a count"},
      {"start: \"\\q\"", "\\q in a literal"},
      {"Start: \"a\"", "neither in small nor in capital"},
      {"", "no rule `start`"},
  };
  for (const Refused& one : cases) {
    const std::string problem = refusal("lark", one.grammar);
    EXPECT_NE(problem.find(one.problem), std::string::npos) << one.grammar << ": " << problem;
    EXPECT_NE(problem.find("tools: 't': format"), std::string::npos) << problem;
  }
  EXPECT_NE(refusal("gbnf", "root ::= \"a\"").find("expected lark or regex"), std::string::npos);
}

// Whatever bytes come: an EBNF grammar or a refusal.
TEST(GrammarLark, AnyTextIsTakenOrRefused) {
  std::mt19937 random(3);
  const std::vector<std::string> seeds = {kPatch,
                                          R"(?start: [A] B~2..3 ("x"i | "a".."z")* -> t)"
                                          "\nA.2: /a[^\\]b-d]{2,}\\d?/s\n%ignore A",
                                          R"((?:a|[^b-d\n]+?)*\x41{2,3}(?P<n>\u00e9)$)"};
  const std::string bytes = "()[]{}|*+?.,:~/\\\"'-_%<>^$ \nabzAZ09\xc3\xa9\x01";
  int taken = 0;
  for (int round = 0; round < 10'000; ++round) {
    std::string text = seeds[random() % seeds.size()];
    for (size_t change = random() % 4; change > 0; --change) {
      const size_t at = random() % text.size();
      const size_t count = random() % 3;
      text.replace(at, count, std::string(1, bytes[random() % bytes.size()]));
      if (text.empty()) text = "a";
    }
    if (random() % 4 == 0) text.resize(1 + random() % text.size());
    try {
      taken += !lark_to_ebnf(text, "w").empty() ? 1 : 0;
    } catch (const InputError&) {
    }
    try {
      taken += !regex_to_ebnf(text, "w").empty() ? 1 : 0;
    } catch (const InputError&) {
    }
  }
  EXPECT_GT(taken, 1000);
}

// No input can hold what ends it, whatever its grammar would take.
TEST(GrammarLark, TheMarkupsMarkerStaysOut) {
  const json tools = {
      {{"name", "t"}, {"format", {{"syntax", "regex"}, {"definition", "(?:.|\\n)*"}}}}};
  GrammarSession session(nano_compiler().compile({Grammar::Kind::kToolCalls, tools.dump(), true}),
                         false);
  text::ChatPrompt prompt;
  prompt.text = "\n\n";
  text::write_tool_calls(std::vector<text::ToolCall>{{"t", R"({"input": "x"})"}}, prompt);
  const auto ids = nano_tokenizer().encode(prompt.text, prompt.foreign);
  const auto marker = *std::ranges::find(ids, nano_tokenizer().id_of(text::kDsml));
  bool inside = false;
  for (const int32_t id : ids) {
    if (nano_tokenizer().token_bytes(id) == "x") inside = true;
    ASSERT_TRUE(session.accept(id));
    if (inside) break;
  }
  ASSERT_TRUE(inside);
  EXPECT_FALSE(session.accept(marker)) << "only behind </";
}

}  // namespace
}  // namespace hadal::engine_core
