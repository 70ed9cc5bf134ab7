#include "counted_rules.h"

#include <algorithm>
#include <bitset>
#include <string>
#include <tuple>
#include <unordered_set>

#include "compile_time.h"
#include "earley_parser.h"
#include "grammar_builder.h"
#include "grammar_impl.h"
#include "support/logging.h"

namespace xgrammar {

/******************* Automata *******************/

namespace {

/*! \brief The states from which an end can be reached. */
std::vector<bool> StatesWithAWay(const FSMWithStartEnd& fsm) {
  std::vector<bool> has_way(fsm.NumStates(), false);
  for (int end : fsm.GetEnds()) has_way[end] = true;
  for (bool changed = true; changed;) {
    changed = false;
    for (int state = 0; state < fsm.NumStates(); ++state) {
      if (has_way[state]) continue;
      for (const auto& edge : fsm.GetFsm().GetEdges(state)) {
        if (!has_way[edge.target]) continue;
        has_way[state] = changed = true;
        break;
      }
    }
  }
  return has_way;
}

bool HasCharactersOnly(const FSMWithStartEnd& fsm) {
  for (int state = 0; state < fsm.NumStates(); ++state) {
    for (const auto& edge : fsm.GetFsm().GetEdges(state)) {
      if (!edge.IsCharRange() && !edge.IsEpsilon()) return false;
    }
  }
  return true;
}

}  // namespace

std::optional<FSMWithStartEnd> CountedLoop(const FSMWithStartEnd& part) {
  if (!HasCharactersOnly(part)) return std::nullopt;
  auto deterministic = part.ToDFA();
  if (deterministic.IsErr()) return std::nullopt;
  auto minimal = std::move(deterministic).Unwrap().MinimizeDFA();
  if (minimal.IsErr()) return std::nullopt;
  const FSMWithStartEnd dfa = std::move(minimal).Unwrap();
  const std::vector<bool> has_way = StatesWithAWay(dfa);
  const int start = dfa.GetStart();
  if (!has_way[start] || dfa.IsEndState(start)) return std::nullopt;
  FSM loop(dfa.NumStates());
  for (int state = 0; state < dfa.NumStates(); ++state) {
    if (!has_way[state]) continue;
    for (const auto& edge : dfa.GetFsm().GetEdges(state)) {
      if (!has_way[edge.target]) continue;
      // A part would be the beginning of another one, or the start would not tell that a part is
      // over.
      if (dfa.IsEndState(state) || edge.target == start) return std::nullopt;
      loop.AddEdge(state, dfa.IsEndState(edge.target) ? start : edge.target, edge.min, edge.max);
    }
  }
  return FSMWithStartEnd(loop, start, {start}, true);
}

int32_t FindRegexRule(GrammarBuilder* builder, const std::string& regex) {
  for (int32_t rule_id = 0; rule_id < builder->NumRules(); ++rule_id) {
    const int32_t body_id = builder->GetRule(rule_id).body_expr_id;
    if (body_id < 0) continue;  // none yet
    const auto body = builder->GetGrammarExpr(body_id);
    // The first number tells whether it is the text of a JSON string.
    if (body.type != GrammarBuilder::GrammarExprType::kRegex || body[0] != 0) continue;
    if (body.size() != static_cast<int32_t>(regex.size()) + 1) continue;
    const bool is_same =
        std::equal(regex.begin(), regex.end(), body.begin() + 1, [](char character, int32_t byte) {
          return static_cast<uint8_t>(character) == static_cast<uint8_t>(byte);
        });
    if (is_same) return rule_id;
  }
  return -1;
}

std::vector<uint8_t> CloseCountedRules(std::vector<FSMWithStartEnd>* rules, int32_t root_rule_id) {
  std::vector<uint8_t> is_referenced(rules->size(), 0), is_repeated(rules->size(), 0);
  is_referenced[root_rule_id] = 1;
  for (const auto& fsm : *rules) {
    for (int state = 0; state < fsm.NumStates(); ++state) {
      for (const auto& edge : fsm.GetFsm().GetEdges(state)) {
        if (edge.IsRuleRef()) is_referenced[edge.GetRefRuleId()] = 1;
        if (edge.IsRepeatRef()) {
          is_repeated[fsm.GetFsm().GetRepeatEdgeInfo(edge.GetAuxIndex()).RuleId()] = 1;
        }
      }
    }
  }
  std::vector<uint8_t> is_counted(rules->size(), 0);
  for (size_t i = 0; i < rules->size(); ++i) {
    if (is_referenced[i] != 0 || is_repeated[i] == 0) continue;
    if (auto loop = CountedLoop((*rules)[i])) {
      (*rules)[i] = std::move(*loop);
      is_counted[i] = 1;
    }
  }
  return is_counted;
}

/******************* What follows a rule *******************/

namespace {

/*! \brief Finds the bytes that may follow a rule, so that what tokens do there is known before
 * somebody waits for it. */
class BytesBehind {
 private:
  auto Edges(int32_t rule_id, int state) const {
    return grammar_->per_rule_fsms[rule_id]->GetFsm().GetFsm().GetEdges(state);
  }

 public:
  explicit BytesBehind(const Grammar& grammar) : grammar_(grammar) {
    for (int32_t rule_id = 0; rule_id < grammar_->NumRules(); ++rule_id) {
      std::unordered_set<int> states;
      grammar_->per_rule_fsms[rule_id]->GetFsm().GetReachableStates(&states);
      for (int state : states) {
        for (const auto& edge : Edges(rule_id, state)) {
          if (Referenced(edge) >= 0) places_[Referenced(edge)].emplace_back(rule_id, edge.target);
        }
      }
    }
  }

  std::bitset<256> Of(int32_t rule_id) {
    EndOf(rule_id);
    while (!open_.empty()) {
      const auto [rule, state] = open_.back();
      open_.pop_back();
      const auto& fsm = grammar_->per_rule_fsms[rule]->GetFsm();
      if (fsm.IsEndState(state)) EndOf(rule);
      for (const auto& edge : Edges(rule, state)) {
        if (edge.IsCharRange()) {
          for (int byte = edge.min; byte <= edge.max; ++byte) bytes_.set(byte);
        } else if (edge.IsEpsilon()) {
          Visit(rule, edge.target);
        } else if (const int32_t inner = Referenced(edge); inner >= 0) {
          Visit(inner, grammar_->per_rule_fsms[inner]->GetFsm().GetStart());
          if (MayBeEmpty(edge)) Visit(rule, edge.target);
        }
      }
    }
    return bytes_;
  }

 private:
  int32_t Referenced(const FSMEdge& edge) const {
    if (edge.IsRuleRef()) return edge.GetRefRuleId();
    if (!edge.IsRepeatRef()) return -1;
    return grammar_->complete_fsm.GetRepeatEdgeInfo(edge.GetAuxIndex()).RuleId();
  }

  bool MayBeEmpty(const FSMEdge& edge) const {
    const auto& ids = grammar_->allow_empty_rule_ids;
    if (std::binary_search(ids.begin(), ids.end(), Referenced(edge))) return true;
    return edge.IsRepeatRef() &&
           grammar_->complete_fsm.GetRepeatEdgeInfo(edge.GetAuxIndex()).Lower() == 0;
  }

  void EndOf(int32_t rule_id) {
    if (!ended_.insert(rule_id).second) return;
    for (const auto& [rule, state] : places_[rule_id]) Visit(rule, state);
  }

  void Visit(int32_t rule_id, int state) {
    if (visited_.insert(state).second) open_.emplace_back(rule_id, state);
  }

  const Grammar& grammar_;
  // By rule: where it is over.
  std::unordered_map<int32_t, std::vector<std::pair<int32_t, int>>> places_;
  std::unordered_set<int32_t> ended_;
  std::unordered_set<int> visited_;  // states of all rules are of one automaton
  std::vector<std::pair<int32_t, int>> open_;
  std::bitset<256> bytes_;
};

}  // namespace

/******************* Tokens *******************/

/*! \brief What tokens do in one rule. The automaton's states have numbers of their own here; 0 is
 * its start. */
class CountedRules::Table {
 public:
  /*! \brief bytes_behind: what may follow the rule. */
  Table(const CompactFSMWithStartEnd& fsm,
        const TokenizerInfo& tokenizer_info,
        const std::bitset<256>& bytes_behind);

  /*! \brief Accepts the tokens that stay inside, where that many parts may begin (beside one that
   * has begun). */
  void AcceptInside(int32_t element_id, int32_t parts, DynamicBitset* accepted) const;

  /*! \brief Accepts the tokens that end between from and to parts and go on as the parser may
   * behind them. */
  void AcceptLeaving(EarleyParser* parser,
                     const Grammar& grammar,
                     const ParserState& state,
                     int32_t from,
                     int32_t to,
                     DynamicBitset* accepted) const;

  /*! \brief Of those that any token ends. */
  int32_t MostParts() const { return most_parts_; }

  std::size_t Bytes() const;

 private:
  static constexpr int16_t kNowhere = -1;
  // Fewer tokens than so many are set one by one, which is no slower than to join bitmaps.
  static constexpr int32_t kFewTokens = 1024;

  /*! \brief Tokens that stay inside. */
  struct Inside {
    // By the parts they take: those they end, and one more if they end within one.
    std::vector<int32_t> tokens;
    // counts[n]: of the tokens that take at most n.
    std::vector<int32_t> counts;
    // bitmaps[n]: the tokens that take at most n, while many take more.
    std::vector<DynamicBitset> bitmaps;
  };

  /*! \brief Tokens that are between two parts before a certain byte, which need not be theirs to
   * take. */
  struct Leaving {
    struct Rest {
      std::string_view text;
      int32_t first;
    };
    // What is left of a token from that byte on, sorted; the last one is a sentinel.
    std::vector<Rest> rests;
    // By rest: the token, the parts it has ended before.
    std::vector<std::pair<int32_t, int32_t>> tokens;
  };

  /*! \brief A token's way from a state. Calls at_start(byte, parts) where it is between two parts
   * behind a whole one. */
  template <typename AtStart>
  std::pair<int16_t, int32_t> Run(int16_t state, const std::string& token, AtStart at_start) const {
    int32_t parts = 0;
    for (size_t i = 0; i < token.size(); ++i) {
      if (state == 0 && parts > 0) at_start(i, parts);
      state = next_[state][static_cast<uint8_t>(token[i])];
      if (state == kNowhere) break;
      if (state == 0) ++parts;
    }
    return {state, parts};
  }

  void FindInside(int16_t state);
  using AllLeaving = std::array<std::unique_ptr<const Leaving>, 256>;
  /*! \brief By byte, of those asked for at least. */
  const AllLeaving& TokensBefore(int16_t state, const std::bitset<256>& bytes) const;

  TokenizerInfo tokenizer_info_;
  std::unordered_map<int32_t, int16_t> numbers_;
  std::vector<int32_t> elements_;
  std::vector<std::array<int16_t, 256>> next_;
  std::vector<Inside> inside_;
  int32_t most_parts_ = 0;
  // By state. What is missing is found when it is asked for; what is there stays.
  mutable std::mutex mutex_;
  mutable std::vector<AllLeaving> leaving_;
};

CountedRules::Table::Table(const CompactFSMWithStartEnd& fsm,
                           const TokenizerInfo& tokenizer_info,
                           const std::bitset<256>& bytes_behind)
    : tokenizer_info_(tokenizer_info) {
  const auto number = [&](int32_t element_id) {
    const auto [place, is_new] =
        numbers_.emplace(element_id, static_cast<int16_t>(elements_.size()));
    if (is_new) {
      elements_.push_back(element_id);
      next_.emplace_back().fill(kNowhere);
    }
    return place->second;
  };
  number(fsm.GetStart());
  for (size_t state = 0; state < elements_.size(); ++state) {
    for (const auto& edge : fsm.GetFsm().GetEdges(elements_[state])) {
      const int16_t target = number(edge.target);
      for (int byte = edge.min; byte <= edge.max; ++byte) next_[state][byte] = target;
    }
  }
  inside_.resize(elements_.size());
  leaving_.resize(elements_.size());
  for (size_t state = 0; state < elements_.size(); ++state) {
    CheckCompileTime();
    FindInside(static_cast<int16_t>(state));
    TokensBefore(static_cast<int16_t>(state), bytes_behind);
  }
}

void CountedRules::Table::FindInside(int16_t state) {
  std::vector<std::pair<int32_t, int32_t>> found;  // parts, token
  int32_t most = 0;
  for (const auto& [token, text] : tokenizer_info_.GetSortedDecodedVocab()) {
    const auto [end, parts] = Run(state, text, [](size_t, int32_t) {});
    most_parts_ = std::max(most_parts_, parts);
    if (end == kNowhere) continue;
    found.emplace_back(parts + (end != 0 ? 1 : 0), token);
    most = std::max(most, found.back().first);
  }
  std::sort(found.begin(), found.end());
  Inside& inside = inside_[state];
  inside.counts.resize(most + 1);
  for (const auto& [parts, token] : found) {
    inside.tokens.push_back(token);
    inside.counts[parts] = static_cast<int32_t>(inside.tokens.size());
  }
  for (int32_t parts = 1; parts <= most; ++parts) {
    inside.counts[parts] = std::max(inside.counts[parts], inside.counts[parts - 1]);
  }
  DynamicBitset bitmap(tokenizer_info_.GetVocabSize());
  for (int32_t parts = 0, set = 0; parts <= most; ++parts) {
    if (inside.tokens.size() < kFewTokens) break;
    for (; set < inside.counts[parts]; ++set) bitmap.Set(inside.tokens[set]);
    inside.bitmaps.push_back(bitmap);
    if (static_cast<int32_t>(inside.tokens.size()) - set < kFewTokens) break;
  }
}

const CountedRules::Table::AllLeaving& CountedRules::Table::TokensBefore(
    int16_t state, const std::bitset<256>& bytes) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  AllLeaving& leaving = leaving_[state];
  std::bitset<256> missing;
  for (int byte = 0; byte < 256; ++byte) missing[byte] = bytes[byte] && leaving[byte] == nullptr;
  if (missing.none()) return leaving;
  std::vector<std::tuple<std::string_view, int32_t, int32_t>> found;
  for (const auto& entry : tokenizer_info_.GetSortedDecodedVocab()) {
    const std::string_view text = entry.second;
    Run(state, entry.second, [&](size_t i, int32_t parts) {
      if (missing[static_cast<uint8_t>(text[i])]) {
        found.emplace_back(text.substr(i), entry.first, parts);
      }
    });
  }
  std::sort(found.begin(), found.end());
  size_t i = 0;
  for (int byte = 0; byte < 256; ++byte) {
    if (!missing[byte]) continue;
    auto before = std::make_unique<Leaving>();
    for (; i < found.size(); ++i) {
      const auto& [text, token, parts] = found[i];
      if (static_cast<uint8_t>(text[0]) != byte) break;
      if (before->rests.empty() || before->rests.back().text != text) {
        before->rests.push_back({text, static_cast<int32_t>(before->tokens.size())});
      }
      before->tokens.emplace_back(token, parts);
    }
    before->rests.push_back({{}, static_cast<int32_t>(before->tokens.size())});
    leaving[byte] = std::move(before);
  }
  return leaving;
}

void CountedRules::Table::AcceptInside(int32_t element_id,
                                       int32_t parts,
                                       DynamicBitset* accepted) const {
  const Inside& inside = inside_[numbers_.at(element_id)];
  const int32_t most = std::min(parts, static_cast<int32_t>(inside.counts.size()) - 1);
  if (most < 0) return;
  int32_t set = 0;
  if (!inside.bitmaps.empty()) {
    const int32_t level = std::min(most, static_cast<int32_t>(inside.bitmaps.size()) - 1);
    *accepted |= inside.bitmaps[level];
    set = inside.counts[level];
  }
  for (; set < inside.counts[most]; ++set) accepted->Set(inside.tokens[set]);
}

void CountedRules::Table::AcceptLeaving(EarleyParser* parser,
                                        const Grammar& grammar,
                                        const ParserState& state,
                                        int32_t from,
                                        int32_t to,
                                        DynamicBitset* accepted) const {
  // The parser as if the parts had come and the rule was over.
  ParserState over = state;
  over.element_id = elements_[0];
  over.sub_element_id = kNoMoreParts;
  over.repeat_count = state.repeat_count + from;
  parser->PushStateAndExpand(over);
  std::bitset<256> bytes;
  for (const auto& next : parser->GetLatestScanableStates()) {
    const auto& fsm = grammar->per_rule_fsms[next.rule_id]->GetFsm().GetFsm();
    for (const auto& edge : fsm.GetEdges(next.element_id)) {
      if (!edge.IsCharRange()) continue;
      for (int byte = edge.min; byte <= edge.max; ++byte) bytes.set(byte);
    }
  }
  const AllLeaving& all = TokensBefore(numbers_.at(state.element_id), bytes);
  for (int byte = 0; byte < 256; ++byte) {
    if (!bytes[byte]) continue;
    const Leaving& leaving = *all[byte];
    std::string_view previous;
    size_t matched = 0;  // bytes of the previous one
    for (size_t i = 0; i + 1 < leaving.rests.size(); ++i) {
      const auto first = leaving.tokens.begin() + leaving.rests[i].first;
      const auto last = leaving.tokens.begin() + leaving.rests[i + 1].first;
      const bool is_open = std::any_of(first, last, [&](const auto& token) {
        return from <= token.second && token.second <= to && !(*accepted)[token.first];
      });
      if (!is_open) continue;
      const std::string_view text = leaving.rests[i].text;
      const size_t common =
          std::mismatch(text.begin(), text.end(), previous.begin(), previous.end()).first -
          text.begin();
      previous = text;
      if (common > matched) continue;  // refused where the previous one was
      parser->PopLastStates(static_cast<int32_t>(matched - common));
      matched = common;
      while (matched < text.size() && parser->Advance(static_cast<uint8_t>(text[matched]))) {
        ++matched;
      }
      if (matched < text.size()) continue;
      for (auto token = first; token != last; ++token) {
        if (from <= token->second && token->second <= to) accepted->Set(token->first);
      }
    }
    parser->PopLastStates(static_cast<int32_t>(matched));
  }
  parser->PopLastStates(1);
}

std::size_t CountedRules::Table::Bytes() const {
  std::size_t bytes = next_.size() * (sizeof(next_[0]) + sizeof(leaving_[0]));
  for (const auto& inside : inside_) {
    bytes += 4 * (inside.tokens.size() + inside.counts.size());
    for (const auto& bitmap : inside.bitmaps) bytes += MemorySize(bitmap);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& state : leaving_) {
    for (const auto& leaving : state) {
      if (leaving == nullptr) continue;
      bytes += leaving->rests.size() * sizeof(Leaving::Rest) + leaving->tokens.size() * 8;
    }
  }
  return bytes;
}

void CountedRules::Add(int32_t rule_id,
                       const Grammar& grammar,
                       const TokenizerInfo& tokenizer_info) {
  const auto& fsm = grammar->per_rule_fsms[rule_id]->GetFsm();
  const std::bitset<256> bytes = BytesBehind(grammar).Of(rule_id);
  tables_.emplace(rule_id, std::make_shared<const Table>(fsm, tokenizer_info, bytes));
}

void CountedRules::AcceptTokens(EarleyParser* parser,
                                const Grammar& grammar,
                                const ParserState& state,
                                DynamicBitset* accepted) const {
  const Table& table = *tables_.at(state.rule_id);
  const auto bounds = parser->RepeatBounds(state);
  int32_t most = 0;
  for (const auto& [lower, upper] : bounds) most = std::max(most, upper);
  table.AcceptInside(state.element_id, most - state.repeat_count, accepted);
  // Between two bounds, any number of parts is as good as another one.
  const auto allows = [&](int64_t parts) {
    const int64_t count = state.repeat_count + parts;
    std::vector<bool> allowed;
    for (const auto& [lower, upper] : bounds) allowed.push_back(lower <= count && count <= upper);
    return allowed;
  };
  for (int32_t from = 1; from <= table.MostParts();) {
    const std::vector<bool> allowed = allows(from);
    int64_t next = int64_t{table.MostParts()} + 1;
    for (const auto& [lower, upper] : bounds) {
      for (const int64_t bound : {int64_t{lower}, int64_t{upper} + 1}) {
        const int64_t parts = bound - state.repeat_count;
        if (parts > from) next = std::min(next, parts);
      }
    }
    if (std::find(allowed.begin(), allowed.end(), true) != allowed.end()) {
      table.AcceptLeaving(parser, grammar, state, from, static_cast<int32_t>(next) - 1, accepted);
    }
    from = static_cast<int32_t>(next);
  }
}

std::size_t MemorySize(const CountedRules& rules) {
  std::size_t bytes = 0;
  for (const auto& [rule_id, table] : rules.tables_) bytes += table->Bytes();
  return bytes;
}

}  // namespace xgrammar
