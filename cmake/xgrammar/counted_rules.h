// hadal's addition to xgrammar: rules whose repetitions are counted. Compiled with the copies of
// xgrammar's files.
//
// xgrammar repeats a rule by completing and predicting it again for each part, so that what a token
// may do is never known before the parser has tried it, byte by byte. But where a text is made of
// such parts in one way only (no part is the beginning of another one: a character, a fixed word),
// an automaton of any number of parts and a counter say as much, and all a token does inside
// depends on the automaton's state alone. So:
//
//   - a rule that is referenced by repeat edges only, and whose parts are such, gets the automaton
//   of all its repetitions;
//     the automaton's start, its only end, stands between two parts (CloseCountedRules);
//   - the parser counts: ParserState::repeat_count of a state of such a rule is the number of whole
//   parts before it. The
//     repeat edges that wait for the rule hold the bounds; one rule serves them all (the mends of
//     earley_parser.cc);
//   - the tokens that stay inside, by the number of parts they begin, and those that leave, by what
//   they do behind, are found
//     when the grammar is compiled, from the automaton alone. A mask takes those that fit
//     (CountedRules).
#ifndef XGRAMMAR_COUNTED_RULES_H_
#define XGRAMMAR_COUNTED_RULES_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "fsm.h"
#include "support/dynamic_bitset.h"
#include "xgrammar/grammar.h"
#include "xgrammar/tokenizer_info.h"

namespace xgrammar {

class EarleyParser;
class GrammarBuilder;
struct ParserState;

/*! \brief Up to so many characters, a repetition is unrolled: the parser knows more of what is
 * behind it then. */
constexpr int64_t kMaxUnrolled = 16;

/*! \brief ParserState::sub_element_id of a state of a counted rule that is to have no further part.
 */
constexpr int32_t kNoMoreParts = 1;

/*! \brief The automaton of any number of parts; nullopt if texts may be made of parts in several
 * ways. */
std::optional<FSMWithStartEnd> CountedLoop(const FSMWithStartEnd& part);

/*! \brief The rule whose body is this regular expression, -1 if there is none. */
int32_t FindRegexRule(GrammarBuilder* builder, const std::string& regex);

/*! \brief Gives the rules that can be counted their loops. \return Whether each rule is counted. */
std::vector<uint8_t> CloseCountedRules(std::vector<FSMWithStartEnd>* rules, int32_t root_rule_id);

/*! \brief What the tokens of a vocabulary do in the counted rules of a grammar. Safe from many
 * threads. */
class CountedRules {
 public:
  void Add(int32_t rule_id, const Grammar& grammar, const TokenizerInfo& tokenizer_info);

  /*! \brief Accepts the tokens that may come next for this state of a counted rule, which is one of
   * the parser's latest. */
  void AcceptTokens(EarleyParser* parser,
                    const Grammar& grammar,
                    const ParserState& state,
                    DynamicBitset* accepted) const;

  friend std::size_t MemorySize(const CountedRules& rules);

 private:
  class Table;
  // Sparse: by rule.
  std::unordered_map<int32_t, std::shared_ptr<const Table>> tables_;
};

}  // namespace xgrammar

#endif  // XGRAMMAR_COUNTED_RULES_H_
