// What a step is asked for beside its states: tokens drawn behind its rows, and what the model
// gives the tokens of prompts, collected while their chunks are computed.
#include <algorithm>
#include <exception>
#include <iterator>

#include "base/check.h"
#include "engine_core/schedule/scheduler.h"
#include "engine_core/schedule/scheduler_state.h"

namespace hadal::engine_core {

// The tokens whose states may come from elsewhere. A token's score needs the row of the one before
// it, so a prompt that is to be scored starts where its scores end, whatever the tree knows.
std::span<const int64_t> Scheduler::reusable(const Sequence& sequence) {
  const std::span<const int64_t> tokens = sequence.tokens;
  const RequestState& request = *sequence.request;
  return request.wants_scores() ? tokens.first(request.scores->size()) : tokens;
}

// How the token behind the last one and `row` drafts is drawn, but for its mask.
Draw Scheduler::draw_of(Sequence& sequence, int64_t row) {
  const RequestState& state = *sequence.request;
  const Request& request = state.request;
  const std::span<const int64_t> tokens = sequence.tokens;
  const int64_t answered = sequence.num_tokens() - state.prompt_size() + row;
  return {.row = row,
          .sampling = &request.sampling,
          .choice = sequence.choice,
          .pos = sequence.num_tokens() + row,
          .prompt = tokens.first(request.prompt.size()),
          .answer = tokens.subspan(request.prompt.size()),
          .ahead = std::span<const int64_t>(sequence.drafts).first(static_cast<size_t>(row)),
          .avoided = answered < request.min_tokens ? std::span<const int64_t>(state.ends)
                                                   : std::span<const int64_t>(),
          .memory = &sequence.memory};
}

void Scheduler::plan_draws(Sequence& sequence) {
  const Request& request = sequence.request->request;
  if (request.max_tokens == 0) return;
  const auto add = [&](Sequence& choice, int64_t row) {
    Draw& draw = sequence.draws.emplace_back(draw_of(choice, row));
    draw.masked_later = choice.filter->masks_tokens();
    draw.top_logprobs = request.top_logprobs;
    draw.sampled_logprob = request.sampled_logprobs;
  };
  for (int64_t row = 0; row <= std::ssize(sequence.drafts); ++row) add(sequence, row);
  for (Sequence* choice : sequence.request->awaiting()) add(*choice, 0);
}

// Grammars take their time: their masks are made while the step runs.
void Scheduler::set_masks(Sequence& sequence) {
  if (sequence.draws.empty()) return;
  auto draw = sequence.draws.begin();
  const auto set = [&](Sequence& choice, std::span<const int64_t> drafts) {
    choice.mask_error.clear();
    try {
      for (const std::span<const int32_t> mask : choice.filter->masks(drafts))
        (draw++)->mask = mask;
    } catch (const std::exception& error) {
      // Drawn without a mask, and then not taken.
      choice.mask_error = error.what();
      draw += 1 + std::ssize(drafts);
    }
  };
  set(sequence, sequence.drafts);
  for (Sequence* choice : sequence.request->awaiting()) set(*choice, {});
}

// Of the tokens behind the step's rows, those that have none yet. A sequence that was preempted may
// compute some a second time.
ScoredTokens Scheduler::plan_scores(const Sequence& sequence) {
  const RequestState& request = *sequence.request;
  if (!request.wants_scores()) return {};
  const int64_t start = sequence.pos(), begin = std::ssize(*request.scores) - 1;
  const int64_t end = std::min(start + sequence.chunk, request.prompt_size() - 1);
  HADAL_CHECK(begin >= start, "scheduler: rows from ", start, ", the score of token ", begin + 1,
              " is missing");
  if (begin >= end) return {};
  return {.from = begin - start,
          .targets = std::span<const int64_t>(sequence.tokens)
                         .subspan(static_cast<size_t>(begin) + 1, static_cast<size_t>(end - begin)),
          .top = request.request.prompt_logprobs};
}

void Scheduler::take_scores(RequestState& request, std::vector<TokenScore> scores) {
  if (scores.empty()) return;
  std::vector<TokenScore>& all = *request.scores;
  all.insert(all.end(), std::make_move_iterator(scores.begin()),
             std::make_move_iterator(scores.end()));
}

}  // namespace hadal::engine_core
