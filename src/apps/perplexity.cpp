#include "apps/perplexity.h"

#include <algorithm>
#include <numbers>
#include <span>

#include "base/check.h"
#include "text/utf8.h"

namespace hadal::apps {
namespace {

engine_core::Request request_for(std::span<const int64_t> ids, const Window& window) {
  const auto part = ids.subspan(static_cast<size_t>(window.begin),
                                static_cast<size_t>(window.end - window.begin));
  engine_core::Request request;
  request.prompt.assign(part.begin(), part.end());
  request.max_tokens = 0;
  request.prompt_logprobs = 0;
  request.prompt_logprobs_from = window.scored - window.begin;
  request.use_prefix_cache = false;  // windows do not begin alike
  return request;
}

}  // namespace

double TextScore::bits_per_byte() const {
  return nats / std::numbers::ln2 / static_cast<double>(bytes);
}

std::vector<Window> windows_of(int64_t num_tokens, int64_t context) {
  HADAL_CHECK(context >= 2, "windows_of: a context of ", context);
  std::vector<Window> windows;
  for (int64_t scored = 1; scored < num_tokens;) {
    const int64_t begin =
        windows.empty() ? 0 : windows.back().begin + std::max<int64_t>(1, context / 2);
    const int64_t end = std::min(begin + context, num_tokens);
    windows.push_back({begin, scored, end});
    scored = end;
  }
  return windows;
}

void check_text(const std::string& text, const std::string& name) {
  HADAL_INPUT_CHECK(!text.empty(), name, ": holds no text");
  const size_t valid = text::valid_utf8_prefix(text);
  HADAL_INPUT_CHECK(valid == text.size(), name, ": is no UTF-8 at byte ", valid);
}

AnswerEngineOptions scoring_engine(const PerplexityOptions& options) {
  return {.at_once = std::max<int64_t>(1, options.step_tokens / options.context) + 1,
          .step_tokens = options.step_tokens,
          .device = options.cuda ? at::kCUDA : at::kCPU,
          .context = options.context};
}

TextScore score_text(AnswerEngine& engine,
                     const LoadedModel& loaded,
                     const std::string& text,
                     const PerplexityOptions& options,
                     const std::function<void(int64_t bytes)>& progress) {
  std::vector<int64_t> ids = {loaded.config().bos_token_id};
  for (const int32_t id : loaded.tokenizer.encode(text, text::SpecialTokens::kAsText))
    ids.push_back(id);
  const auto num_tokens = static_cast<int64_t>(ids.size());
  TextScore score{.tokens = num_tokens - 1, .bytes = static_cast<int64_t>(text.size())};
  for (const Window& window : windows_of(num_tokens, options.context)) {
    engine.submit(request_for(ids, window), [&, window](const Answered& answered) {
      HADAL_CHECK(answered.prompt_scores, "eval: a window without scores");
      const auto from = static_cast<size_t>(window.scored - window.begin);
      for (const engine_core::TokenScore& token : std::span(*answered.prompt_scores).subspan(from))
        score.nats -= token.logprob;
      if (progress) progress(score.bytes * window.end / num_tokens);
    });
  }
  engine.finish();
  return score;
}

}  // namespace hadal::apps
