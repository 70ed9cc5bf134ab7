// Answers that must match a JSON schema, a regular expression, a grammar or the markup of tool
// calls: which tokens may come next.
//
// GrammarCompiler knows one tokenizer. It compiles grammars on threads of its own, refuses those it
// cannot keep in full, and remembers compiled ones by their text. All of it is safe from many
// threads. A GrammarSession follows one answer, on one thread; it shares the compiled grammar.
//
// An answer is UTF-8 whatever the grammar would take. Added tokens (`<think>`, `<|User|>`, ...) are
// never part of a match, except `|DSML|` in tool calls. EOS is allowed exactly where the text is
// complete. The languages:
//   kJsonObject  any JSON object
//   kJsonSchema  JSON that the schema accepts, members in any order (of more than six properties,
//                or with bounds on their number, in the schema's), none that it does not name
//                unless it says so; no white space twice in a row. Bounds need a `type`; a pattern
//                covers the whole string, as characters, however JSON writes them
//   kRegex       the whole text matches
//   kEbnf        xgrammar's notation (GBNF), from the rule `root`
//   kToolCalls   the block of text/tool_calls.h with its blank line before, one call or more. The
//                arguments of tools with "strict" follow their schema, in any order; with "prefer"
//                they do if it can be kept; with "format": {"syntax": "lark" or "regex",
//                "definition"} their one parameter `input` is a text of that grammar
//                (grammar_lark.h); other tools take any parameters, each once. An object
//                {"tools": [the list], "mode": "auto", "parallel": false} instead of the list
//                allows plain text with or without a block after it ("auto" instead of "required"),
//                and one call only; with "content": {"kind": "json_schema" (json_object, regex,
//                ebnf), "text"} the answer is calls or that. The marker is its own token; text that
//                looks like it is text, and the character U+0001 cannot stand in calls.
// A grammar that has no end (a rule that always needs itself) is refused by the name of the rule.
// xgrammar (Apache-2.0, mlc-ai) does the matching; nothing of it shows here.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine_core/request.h"
#include "text/tokenizer.h"

namespace hadal::engine_core {

struct GrammarLimits {
  size_t text_bytes = size_t{256} << 10;      ///< of one grammar's text
  size_t compiled_bytes = size_t{128} << 20;  ///< of one compiled grammar
  size_t cache_bytes = size_t{256} << 20;     ///< of those remembered
  std::chrono::milliseconds time{10'000};     ///< until compile() gives up
  /// Processor time of one answer's masks, and of one mask on average: where both are exceeded, the
  /// answer ends, since all others wait for it at every token.
  std::chrono::milliseconds masks{2'000}, mean_mask{20};
};

/// One compiled grammar; immutable.
class CompiledGrammar;

class GrammarCompiler {
 public:
  /// `vocab_size`: tokens of the model, at least the tokenizer's (0: as many). The tokenizer need
  /// not outlive the compiler. Errors: InputError if it has no EOS.
  explicit GrammarCompiler(const text::Tokenizer& tokenizer,
                           int64_t vocab_size = 0,
                           GrammarLimits limits = {});
  /// Waits for what still compiles.
  ~GrammarCompiler();

  /// Null for kNone. Blocks for as long as compiling takes: not for the engine's thread. Errors:
  /// InputError naming what is wrong with the grammar, or which limit it exceeds.
  std::shared_ptr<const CompiledGrammar> compile(const Grammar& grammar);

  struct Stats {
    int64_t hits = 0;    ///< compile() found it
    int64_t misses = 0;  ///< it did not
    int64_t grammars = 0;
    size_t bytes = 0;
  };
  Stats stats() const;
  /// 32-bit words of a mask.
  size_t mask_words() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

class GrammarSession {
 public:
  /// With `thinking` the grammar begins behind the first `</think>`; before it every ordinary token
  /// is allowed, and EOS is not.
  GrammarSession(std::shared_ptr<const CompiledGrammar> grammar, bool thinking);
  ~GrammarSession();
  GrammarSession(GrammarSession&&) noexcept;
  GrammarSession& operator=(GrammarSession&&) noexcept;

  /// Whether the token may come next; if so, it has. Equals the token's bit of mask().
  bool accept(int64_t token);
  /// Takes back the last `count` accepted tokens. Errors: Error if there are fewer.
  void rollback(int64_t count);
  /// Sets bit t % 32 of word t / 32 for every token t that may come next; returns whether any may
  /// not. Behind EOS only EOS may come, for drafts that run past the end. `words` has mask_words().
  /// Errors: InputError once masks take too long (GrammarLimits::masks).
  bool mask(std::span<uint32_t> words);
  /// Whether the answer may end here: the text matches, or EOS was accepted.
  bool completed() const;
  /// Tokens accepted and not taken back.
  int64_t length() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace hadal::engine_core
