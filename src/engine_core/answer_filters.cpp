#include "engine_core/answer_filters.h"

#include <utility>

#include "base/check.h"
#include "engine_core/stop.h"

namespace hadal::engine {
namespace {

class TextFilter final : public AnswerFilter {
 public:
  TextFilter(const text::Tokenizer& tokenizer, std::shared_ptr<const StopSet> stops)
      : tokenizer_(tokenizer), stream_(std::move(stops)) {}

  std::span<const int32_t> mask() override { return {}; }

  Accepted accept(int64_t token) override {
    Accepted accepted;
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
};

}  // namespace

std::unique_ptr<AnswerFilter> TextFilters::create(const Request& request) {
  HADAL_INPUT_CHECK(request.grammar.kind == Grammar::Kind::kNone,
                    "structured output is not in this version");
  std::shared_ptr<const StopSet> stops;
  if (!request.stop.empty()) stops = std::make_shared<const StopSet>(request.stop);
  return std::make_unique<TextFilter>(tokenizer_, std::move(stops));
}

}  // namespace hadal::engine
