#include "engine_core/answer/answer_filters.h"

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine_core/answer/answer_text.h"
#include "text/chat_tokens.h"

namespace hadal::engine {
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
        mask_(mask_words) {}

  std::span<const int32_t> mask() override {
    const std::span<const int32_t> whole{reinterpret_cast<const int32_t*>(mask_.data()),
                                         mask_.size()};
    if (budget_ >= 0 && text_.in_reasoning() && text_.reasoning_tokens() >= budget_ &&
        text_.think_end() >= 0) {
      std::fill(mask_.begin(), mask_.end(), 0);
      const auto place = static_cast<size_t>(text_.think_end());
      mask_[place / 32] |= 1u << place % 32;
      return whole;
    }
    if (!grammar_ || !grammar_->mask(mask_)) return {};
    return whole;
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
  AnswerText text_;
  int64_t eos_, budget_;
  bool closes_reasoning_;
  std::optional<GrammarSession> grammar_;
  std::vector<uint32_t> mask_;
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

}  // namespace hadal::engine
