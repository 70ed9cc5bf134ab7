#include "engine_core/answer_filters.h"

#include <optional>
#include <utility>
#include <vector>

#include "base/check.h"
#include "engine_core/stop.h"

namespace hadal::engine {
namespace {

class TextFilter final : public AnswerFilter {
 public:
  TextFilter(const text::Tokenizer& tokenizer,
             std::shared_ptr<const StopSet> stops,
             std::optional<GrammarSession> grammar,
             size_t mask_words)
      : tokenizer_(tokenizer),
        stream_(std::move(stops)),
        grammar_(std::move(grammar)),
        mask_(grammar_ ? mask_words : 0) {}

  std::span<const int32_t> mask() override {
    if (!grammar_ || !grammar_->mask(mask_)) return {};
    return {reinterpret_cast<const int32_t*>(mask_.data()), mask_.size()};
  }

  Accepted accept(int64_t token) override {
    Accepted accepted;
    HADAL_CHECK(!grammar_ || grammar_->accept(token), "engine: token ", token,
                " is not what the grammar allows");
    accepted.text = stream_.push(tokenizer_.token_bytes(static_cast<int32_t>(token)));
    if (stream_.stopped()) {
      accepted.verdict = Verdict::kStopString;
      accepted.matched_stop = *stream_.matched();
    }
    return accepted;
  }

  std::string finish() override { return stream_.finish(); }

 private:
  const text::Tokenizer& tokenizer_;
  StopStream stream_;
  std::optional<GrammarSession> grammar_;
  std::vector<uint32_t> mask_;
};

/// The compiler's form: a list of tools alone means that one has to be called.
Grammar compiler_form(Grammar grammar) {
  if (grammar.kind == Grammar::Kind::kToolCalls && !grammar.must_call)
    grammar.text = concat("{\"tools\": ", grammar.text, ", \"mode\": \"auto\"}");
  return grammar;
}

}  // namespace

std::unique_ptr<AnswerFilter> TextFilters::create(const Request& request) {
  std::optional<GrammarSession> grammar;
  if (const auto compiled = compiler_.compile(compiler_form(request.grammar)))
    grammar.emplace(compiled, request.thinking);
  std::shared_ptr<const StopSet> stops;
  if (!request.stop.empty()) stops = std::make_shared<const StopSet>(request.stop);
  return std::make_unique<TextFilter>(tokenizer_, std::move(stops), std::move(grammar),
                                      compiler_.mask_words());
}

}  // namespace hadal::engine
