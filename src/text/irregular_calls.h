// Calls as models write them beside the rules: shapes, each with what has to come of it. For tests
// and fuzzing. Literals stand for special tokens.
#pragma once

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace hadal::text {

struct IrregularShape {
  bool newline_behind = false;  ///< behind the block
  bool loose_gaps = false;      ///< blank lines and indent between tags
  bool crlf = false;            ///< line ends of the markup
  bool tight_ends = false;      ///< no newline before a closing tag
  bool open_block = false;      ///< the block is not closed
  bool bare_calls = false;      ///< no block around the calls
  bool old_name = false;        ///< V3.2's name of the block
  bool bad_sibling = false;     ///< one of the calls is broken
  bool in_reasoning = false;    ///< before </think>
  bool other_order = false;     ///< attributes
  bool single_quotes = false;   ///< around attributes
  bool marks_missing = false;   ///< parameters do not say what they are
  bool text_between = false;    ///< words between calls
  int which_bad = 0;            ///< how the sibling is broken

  /// All of the first nine, by the bits of a number below 512.
  static IrregularShape of(int bits) {
    IrregularShape shape;
    bool* const flags[] = {&shape.newline_behind, &shape.loose_gaps,  &shape.crlf,
                           &shape.tight_ends,     &shape.open_block,  &shape.bare_calls,
                           &shape.old_name,       &shape.bad_sibling, &shape.in_reasoning};
    for (int i = 0; i < 9; ++i) *flags[i] = (bits >> i & 1) != 0;
    return shape;
  }
  static constexpr int kBad = 8;
};

struct IrregularCompletion {
  std::string text;  ///< with EOS
  std::string reasoning, content;
  std::vector<ToolCall> calls;  ///< the complete ones
  bool lost = false;
};

/// Writes the calls in the shape. The second of them, if any, has the broken sibling before it.
inline IrregularCompletion write_irregular(const IrregularShape& shape,
                                           const std::string& content = "Let me see.") {
  const std::string open = concat("<", kDsml), close = concat("</", kDsml);
  const std::string line = shape.crlf ? "\r\n" : "\n";
  const std::string gap = shape.loose_gaps ? concat(line, line, "  ") : line;
  const std::string before_end = shape.tight_ends ? "" : gap;
  const char quote = shape.single_quotes ? '\'' : '"';
  const auto attribute = [&](const char* name, const std::string& value) {
    return concat(" ", name, "=", quote, value, quote);
  };
  const auto parameter = [&](const std::string& key, bool is_string, const std::string& value) {
    const std::string name = attribute("name", key);
    const std::string mark =
        shape.marks_missing ? "" : attribute("string", is_string ? "true" : "false");
    return concat(open, "parameter", shape.other_order ? mark + name : name + mark, ">", value,
                  close, "parameter>");
  };
  const auto invoke = [&](const std::string& name, const std::string& inside) {
    return concat(open, "invoke", attribute("name", name), ">", gap, inside, before_end, close,
                  "invoke>");
  };
  const std::string n = shape.marks_missing ? "\"7\"" : "7";
  const std::string first =
      invoke("f", concat(parameter("a", true, "x <b>\n y\""), gap, parameter("n", false, "7")));
  const std::string second = invoke("g", parameter("s", true, " 007 "));
  const std::string head = concat(open, "invoke", attribute("name", "bad"), ">", gap);
  const std::string value = parameter("a", true, "v");
  const std::string bad[IrregularShape::kBad] = {
      concat(head, open, "parameter", attribute("name", "a"), attribute("string", "true"), ">half"),
      concat(head, value),                                         // the call is not closed
      concat(open, "invoke>", gap, value, gap, close, "invoke>"),  // it has no name
      concat(head, value, gap, value, gap, close, "invoke>"),      // a parameter comes twice
      concat(head, open, "parameter>v", close, "parameter>", gap, close, "invoke>"),
      head,
      concat(open, "invoke", attribute("name", "bad")),
      concat(head, open, "parameter", attribute("name", "a"), attribute("string", "true"), ">half",
             gap, close, "invoke>"),
  };
  IrregularCompletion out;
  out.calls = {{"f", concat(R"({"a": "x <b>\n y\"", "n": )", n, "}")}, {"g", R"({"s": " 007 "})"}};
  out.lost = shape.bad_sibling;
  const std::string block = shape.old_name ? "function_calls>" : "tool_calls>";
  std::string text = concat(line, line);
  if (!shape.bare_calls) text += concat(open, block, gap);
  text += concat(first, gap);
  out.content = content;
  if (shape.text_between) {
    text += concat("and ", gap);
    out.content += concat(gap, "and");
  }
  if (shape.bad_sibling) text += concat(bad[shape.which_bad], gap);
  text += second;
  if (!shape.bare_calls && !shape.open_block) text += concat(before_end, close, block);
  if (shape.newline_behind) text += line;
  if (shape.in_reasoning) {
    out.reasoning = "hm " + content;
    out.content = shape.text_between ? concat(gap, "and") : "";
    out.text = concat("hm ", content, text, kEos);
  } else {
    out.text = concat("hm</think>", content, text, kEos);
    out.reasoning = "hm";
  }
  return out;
}

}  // namespace hadal::text
