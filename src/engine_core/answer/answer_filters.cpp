#include "engine_core/answer/answer_filters.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine_core/answer/answer_text.h"
#include "text/chat_tokens.h"

namespace hadal::engine_core {
namespace {

class TextFilter final : public AnswerFilter {
 public:
  TextFilter(const text::Tokenizer& tokenizer,
             const Request& request,
             std::optional<GrammarSession> grammar,
             size_t mask_words)
      : text_(tokenizer, request),
        eos_(tokenizer.find(text::kEos).value_or(-1)),
        budget_(request.thinking_budget),
        closes_reasoning_(request.close_reasoning),
        grammar_(std::move(grammar)),
        mask_words_(mask_words) {}

  bool masks_tokens() const override { return grammar_.has_value() || budget_ >= 0; }

  std::vector<std::span<const int32_t>> masks(std::span<const int64_t> draft) override {
    std::vector<std::span<const int32_t>> all(1 + draft.size());
    if (words_.size() < all.size() * mask_words_) words_.resize(all.size() * mask_words_);
    bool reasons = text_.in_reasoning();
    int64_t reasoned = text_.reasoning_tokens(), accepted = 0;
    for (size_t i = 0;; ++i) {
      const std::span words = std::span(words_).subspan(i * mask_words_, mask_words_);
      if (sets_mask(reasons, reasoned, words))
        all[i] = {reinterpret_cast<const int32_t*>(words.data()), words.size()};
      if (i == draft.size() || (grammar_ && !grammar_->accept(draft[i]))) break;
      accepted += grammar_ ? 1 : 0;
      reasoned += reasons ? 1 : 0;
      reasons = reasons && draft[i] != text_.think_end();
    }
    if (accepted > 0) grammar_->rollback(accepted);
    return all;
  }

  int64_t decide(int64_t token) override {
    const bool closes = closes_reasoning_ && token == eos_ && text_.in_reasoning();
    return closes && text_.think_end() >= 0 ? text_.think_end() : token;
  }

  Accepted accept(int64_t token) override {
    Accepted accepted;
    HADAL_CHECK(!grammar_ || grammar_->accept(token), "engine: token ", token,
                " is not what the grammar allows");
    accepted.text = text_.push(token);
    if (text_.stopped()) {
      accepted.verdict = Verdict::kStopString;
      accepted.matched_stop = *text_.matched();
    }
    return accepted;
  }

  std::string finish() override { return text_.finish(); }

 private:
  /// False: every token is allowed.
  bool sets_mask(bool reasons, int64_t reasoned, std::span<uint32_t> words) {
    if (budget_ >= 0 && reasons && reasoned >= budget_ && text_.think_end() >= 0) {
      std::ranges::fill(words, 0);
      const auto place = static_cast<size_t>(text_.think_end());
      words[place / 32] |= 1u << place % 32;
      return true;
    }
    return grammar_ && grammar_->mask(words);
  }

  AnswerText text_;
  int64_t eos_, budget_;
  bool closes_reasoning_;
  std::optional<GrammarSession> grammar_;
  size_t mask_words_;
  std::vector<uint32_t> words_;  ///< of the masks, one behind the other
};

/// The compiler's form: a list of tools alone means that one has to be called.
Grammar compiler_form(Grammar grammar) {
  const bool is_list = grammar.text.find_first_not_of(" \t\r\n") == grammar.text.find('[');
  if (grammar.kind == Grammar::Kind::kToolCalls && !grammar.must_call && is_list)
    grammar.text = concat("{\"tools\": ", grammar.text, ", \"mode\": \"auto\"}");
  return grammar;
}

}  // namespace

std::unique_ptr<AnswerFilter> TextFilters::create(const Request& request) {
  std::optional<GrammarSession> grammar;
  if (const auto compiled = compiler_.compile(compiler_form(request.grammar)))
    grammar.emplace(compiled, request.thinking);
  return std::make_unique<TextFilter>(tokenizer_, request, std::move(grammar),
                                      compiler_.mask_words());
}

}  // namespace hadal::engine_core
