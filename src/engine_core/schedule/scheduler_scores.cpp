// What the model gives the tokens of a prompt: collected while its chunks are computed.
#include <algorithm>

#include "base/check.h"
#include "base/parallel.h"
#include "engine_core/schedule/scheduler.h"
#include "engine_core/schedule/scheduler_state.h"

namespace hadal::engine {

// The tokens whose states may come from elsewhere. A token's score needs the row of the one before
// it, so a prompt that is to be scored starts where its scores end, whatever the tree knows.
std::span<const int64_t> Scheduler::reusable(const Sequence& sequence) {
  const std::span<const int64_t> tokens = sequence.tokens;
  const RequestState& request = *sequence.request;
  return request.wants_scores() ? tokens.first(request.scores->size()) : tokens;
}

// The rows of the step just run. A sequence that was preempted may compute some a second time.
void Scheduler::score_prompt(Sequence& sequence, int64_t index) {
  RequestState& request = *sequence.request;
  std::vector<TokenScore>& scores = *request.scores;
  const int64_t start = steps_[static_cast<size_t>(index)].start;
  const int64_t begin = std::ssize(scores) - 1;
  const int64_t end = std::min(start + sequence.chunk, request.prompt_size() - 1);
  HADAL_CHECK(begin >= start, "scheduler: rows from ", start, ", the score of token ", begin + 1,
              " is missing");
  if (begin >= end) return;
  const auto vocab = static_cast<size_t>(parts_.runner.vocab_size());
  const auto visit = [&](int64_t first, std::span<const float> rows) {
    const size_t known = scores.size();
    const auto count = static_cast<int64_t>(rows.size() / vocab);
    HADAL_CHECK(start + first + 1 == static_cast<int64_t>(known), "scheduler: scores out of order");
    scores.resize(known + static_cast<size_t>(count));
    parallel_for(count, 4, [&](int64_t from, int64_t to) {
      for (auto row = static_cast<size_t>(from); row < static_cast<size_t>(to); ++row) {
        scores[known + row] =
            parts_.sampler.score(rows.subspan(row * vocab, vocab), sequence.tokens[known + row],
                                 request.request.prompt_logprobs);
      }
    });
  };
  parts_.runner.visit_logits(index, begin - start, end - begin, visit);
}

}  // namespace hadal::engine
