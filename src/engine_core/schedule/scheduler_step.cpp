// The scheduler's step: plan, run, hand out what came of it.
#include <algorithm>
#include <exception>
#include <optional>

#include "base/check.h"
#include "base/log.h"
#include "base/math.h"
#include "base/thread_time.h"
#include "engine_core/schedule/scheduler.h"
#include "engine_core/schedule/scheduler_state.h"

namespace hadal::engine_core {
namespace {

using Seconds = std::chrono::duration<double>;

/// Of this thread.
double processor_seconds() { return Seconds(thread_time()).count(); }

}  // namespace

/// Time since it was made.
class Scheduler::Stopwatch {
 public:
  void add_to(Spent& spent) const {
    spent.seconds += Seconds(Clock::now() - wall_).count();
    spent.processor += processor_seconds() - processor_;
  }

 private:
  Clock::time_point wall_ = Clock::now();
  double processor_ = processor_seconds();
};

bool Scheduler::step() {
  const Stopwatch step;
  model_ = {};
  result_ = {};
  expire();
  admit();
  load_prefixes();
  const Clock::time_point planned_at = Clock::now();
  plan();
  reserve_planned();
  std::erase_if(planned_, [](const Sequence* sequence) {
    return sequence->chunk == 0 || sequence->phase != Sequence::Phase::kRunning;
  });
  if (!planned_.empty()) {
    ++stats_.steps;
    bool ran = false;
    try {
      make_drafts();
      run_planned();
      ran = true;
    } catch (const std::exception& error) {
      contain_failure(error.what());
    }
    if (ran) {
      finish_step();
      const double seconds = Seconds(Clock::now() - planned_at).count();
      prompt_pace_.end_step(rows_.answers, rows_.prompts, seconds);
      if (rows_.prompts == 0 && parts_.drafter != nullptr)
        draft_policy_.end_step(rows_.drafts, seconds);
    }
  }
  planned_.clear();
  forget_finished();
  Spent rest;
  step.add_to(rest);
  stats_.model_seconds += model_.seconds - result_.sampling_seconds;
  stats_.sampling_seconds += result_.sampling_seconds;
  stats_.overhead_seconds += rest.seconds - model_.seconds;
  stats_.overhead_cpu_seconds += rest.processor - model_.processor;
  return !requests_.empty();
}

// Rows for everybody: first the answers, then prompts with the rest of the budget.
void Scheduler::plan() {
  planned_.clear();
  std::vector<Sequence*> answers, prompts;
  for (Sequence* sequence : running_) {
    sequence->chunk = sequence->num_drafts = 0;
    if (cache_.loads(sequence->cache)) continue;
    if (sequence->seeks_leader) seek_leader(*sequence);
    if (sequence->leader != nullptr) continue;
    if (sequence->suspect_until > sequence->pos()) {
      sequence->chunk = chunk_limit(*sequence);
      sequence->chunk = std::min(sequence->chunk, options_.step_tokens);
      planned_ = {sequence};
      for (Sequence* other : answers) other->chunk = other->num_drafts = 0;
      return;
    }
    (sequence->remaining() == 1 ? answers : prompts).push_back(sequence);
  }
  const auto num_answers = static_cast<int64_t>(answers.size());
  int64_t rows = num_answers;
  const bool may_draft = parts_.drafter != nullptr && options_.max_drafts > 0 && num_answers > 0;
  int64_t drafts = 0;
  if (may_draft) {
    double acceptance = 0;
    for (const Sequence* sequence : answers)
      acceptance += sequence->acceptance.value(draft_policy_.acceptance());
    draft_policy_.begin_step(num_answers);
    drafts = options_.always_draft
                 ? options_.max_drafts
                 : draft_policy_.length(options_.max_drafts,
                                        acceptance / static_cast<double>(num_answers));
  }
  for (Sequence* sequence : answers) {
    sequence->chunk = 1;
    if (drafts == 0) continue;
    const int64_t limit = std::min(draft_limit(*sequence), options_.step_tokens - rows);
    sequence->num_drafts = std::clamp<int64_t>(limit, 0, drafts);
    rows += sequence->num_drafts;
  }
  // However many answers there are, prompts get something, so that none waits for ever.
  int64_t budget = options_.prompt_tokens;
  if (num_answers > 0) {
    const int64_t limit =
        std::max({options_.step_tokens - rows, options_.step_tokens / 4, int64_t{1}});
    budget = prompt_pace_.rows(num_answers, limit);
  }
  plan_prompts(prompts, budget);
  planned_ = running_;
}

// Half for the one that comes first, the rest for the shortest, so that a long prompt neither waits
// nor makes short ones wait.
void Scheduler::plan_prompts(std::span<Sequence* const> prompts, int64_t budget) {
  if (prompts.empty()) return;
  Sequence& first = *prompts.front();
  const int64_t share = prompts.size() == 1 ? budget : ceil_div(budget, 2);
  first.chunk = std::min(chunk_limit(first), share);
  budget -= first.chunk;
  std::vector<Sequence*> others(prompts.begin() + 1, prompts.end());
  std::ranges::stable_sort(others, {}, [&](const Sequence* other) { return until_taken(*other); });
  for (Sequence* other : others) {
    if (budget == 0) return;
    other->chunk = std::min(chunk_limit(*other), budget);
    budget -= other->chunk;
  }
  first.chunk = std::min(chunk_limit(first), first.chunk + budget);
}

// Known tokens until the next place where the state is kept.
int64_t Scheduler::chunk_limit(const Sequence& sequence) const {
  int64_t end = sequence.num_tokens();
  if (sequence.cache.use_tree) {
    end = std::min(end, cache_.next_kept(sequence.pos()));
    const int64_t last = sequence.request->prompt_size() - 1;
    if (options_.snapshot_prompts && sequence.pos() < last) end = std::min(end, last);
  }
  if (end - sequence.pos() > 1) end = std::min(end, sequence.pos() + until_taken(sequence));
  return end - sequence.pos();
}

int64_t Scheduler::draft_limit(const Sequence& sequence) const {
  if (parts_.drafter == nullptr || options_.max_drafts == 0) return 0;
  const RequestState& request = *sequence.request;
  const auto awaits_prompt = [](const std::unique_ptr<Sequence>& other) {
    return other->phase == Sequence::Phase::kAwaitsPrompt;
  };
  // Other choices continue from the state behind the prompt.
  if (std::ranges::any_of(request.sequences, awaits_prompt)) return 0;
  const int64_t answered = sequence.num_tokens() - request.prompt_size();
  int64_t limit = std::min({options_.max_drafts, request.request.max_tokens - answered - 1,
                            max_tokens_ - sequence.num_tokens() - 1});
  // The state is kept exactly there: never run past it.
  if (sequence.cache.use_tree) {
    limit = std::min(limit, cache_.next_kept(sequence.pos()) - sequence.pos() - 1);
  }
  return limit;
}

// Memory for the planned rows, best sequence first; the worst give theirs up.
void Scheduler::reserve_planned() {
  for (Sequence* sequence : planned_) {
    while (sequence->chunk > 0 &&
           !cache_.reserve(sequence->cache,
                           sequence->pos() + sequence->chunk + sequence->num_drafts)) {
      if (sequence->num_drafts > 0) {
        sequence->num_drafts = 0;
        continue;
      }
      if (running_.size() == 1) {
        fail(*sequence->request, "scheduler: one sequence does not fit into memory");
        break;
      }
      preempt(*worst_running(), true);
    }
  }
}

void Scheduler::make_drafts() {
  std::vector<DraftRequest> requests;
  std::vector<Sequence*> drafting;
  for (Sequence* sequence : planned_) {
    sequence->drafts.clear();
    if (sequence->num_drafts == 0) continue;
    Draw next = draw_of(*sequence, 0);
    try {
      next.mask = sequence->filter->masks({}).front();
    } catch (const std::exception&) {
      continue;  // it will be asked again, and then its answer ends
    }
    requests.push_back({.slot = sequence->cache.slot,
                        .tokens = sequence->tokens,
                        .pages = sequence->cache.pages,
                        .max_drafts = sequence->num_drafts,
                        .next = next,
                        .filter = sequence->filter.get(),
                        .ends = sequence->request->ends,
                        .drafts = {}});
    drafting.push_back(sequence);
  }
  if (requests.empty()) return;
  const Stopwatch watch;
  parts_.drafter->draft(requests);
  watch.add_to(model_);
  for (size_t i = 0; i < requests.size(); ++i) {
    std::vector<int64_t>& drafts = requests[i].drafts;
    const auto limit = static_cast<size_t>(drafting[i]->num_drafts);
    const auto invalid = std::ranges::find_if(
        drafts, [&](int64_t token) { return token < 0 || token >= info_.vocab_size; });
    drafts.erase(invalid, drafts.end());
    if (drafts.size() > limit) drafts.resize(limit);
    drafting[i]->drafts = std::move(drafts);
  }
}

void Scheduler::build_steps() {
  steps_.clear();
  rows_ = {};
  for (Sequence* sequence : planned_) {
    const auto pos = static_cast<size_t>(sequence->pos());
    std::span<const int64_t> tokens = std::span<const int64_t>(sequence->tokens)
                                          .subspan(pos, static_cast<size_t>(sequence->chunk));
    const bool draws = sequence->remaining() == sequence->chunk;
    if (!sequence->drafts.empty()) {
      sequence->rows.assign(1, sequence->tokens.back());
      sequence->rows.insert(sequence->rows.end(), sequence->drafts.begin(), sequence->drafts.end());
      tokens = sequence->rows;
    }
    sequence->draws.clear();
    if (draws) plan_draws(*sequence);
    const auto num_pages =
        static_cast<size_t>(cache_.num_pages_for(static_cast<int64_t>(pos + tokens.size())));
    steps_.push_back({.slot = sequence->cache.slot,
                      .start = sequence->pos(),
                      .tokens = tokens,
                      .pages = std::span<const int64_t>(sequence->cache.pages).first(num_pages),
                      .num_logits = draws ? 1 + std::ssize(sequence->drafts) : 0,
                      .draws = sequence->draws,
                      .scored = plan_scores(*sequence)});
    if (draws && sequence->chunk == 1) {
      ++rows_.answers;
    } else {
      rows_.prompts += sequence->chunk;
    }
    rows_.drafts += static_cast<int64_t>(sequence->drafts.size());
  }
}

// What the step does not need from the start is made while it runs.
void Scheduler::run_planned() {
  build_steps();
  const Stopwatch launching;
  const Runner::Ticket ticket = parts_.runner.launch(steps_);
  launching.add_to(model_);
  for (Sequence* sequence : planned_) set_masks(*sequence);
  const Stopwatch collecting;
  result_ = parts_.runner.collect(ticket);
  collecting.add_to(model_);
  HADAL_CHECK(result_.sequences.size() == steps_.size(), "scheduler: results of ",
              result_.sequences.size(), " sequences, not ", steps_.size());
}

// Nobody knows whose tokens made the step throw, nor what the states are now: everybody starts over
// from what was kept before, alone, until the step that threw is behind. Who was alone fails.
void Scheduler::contain_failure(const std::string& what) {
  if (planned_.size() == 1) {
    fail(*planned_.front()->request, what);
    return;
  }
  log::warn("engine", "a step of ", planned_.size(), " sequences failed: ", what,
            "; repeating it one by one");
  for (Sequence* sequence : planned_) {
    if (sequence->phase != Sequence::Phase::kRunning) continue;
    sequence->suspect_until = sequence->pos() + sequence->chunk;
    preempt(*sequence, false);
  }
}

void Scheduler::finish_step() {
  for (size_t index = 0; index < planned_.size(); ++index) {
    Sequence& sequence = *planned_[index];
    // Its request may have failed with another choice of it in this very step.
    if (sequence.phase != Sequence::Phase::kRunning) continue;
    try {
      advance(sequence, static_cast<int64_t>(index));
    } catch (const std::exception& error) {
      fail(*sequence.request, error.what());
    }
  }
}

void Scheduler::advance(Sequence& sequence, int64_t index) {
  const SequenceStep& step = steps_[static_cast<size_t>(index)];
  SequenceResult& result = result_.sequences[static_cast<size_t>(index)];
  HADAL_CHECK(result.drawn.size() == step.draws.size() &&
                  result.scores.size() == step.scored.targets.size(),
              "scheduler: ", result.drawn.size(), " tokens and ", result.scores.size(),
              " scores where ", step.draws.size(), " and ", step.scored.targets.size(),
              " were asked for");
  take_scores(*sequence.request, std::move(result.scores));
  sequence.cache.pos += sequence.chunk;
  serve_followers(sequence);
  std::optional<FinishReason> reason;
  Update update;
  if (step.num_logits > 0) {
    const std::span<Sampled> drawn = result.drawn;
    const auto num_drafts = std::ssize(sequence.drafts);
    const bool draws = !drawn.empty();  // or the prompt is all that was asked for
    fork_choices(sequence, draws ? drawn.subspan(static_cast<size_t>(num_drafts) + 1) : drawn);
    int64_t accepted = 0;
    for (int64_t row = 0;; ++row) {
      reason = draws ? take_token(sequence, std::move(drawn[static_cast<size_t>(row)]), update)
                     : FinishReason::kLength;
      if (reason || row == num_drafts ||
          sequence.tokens.back() != sequence.drafts[static_cast<size_t>(row)]) {
        break;
      }
      ++accepted;
    }
    sequence.cache.pos += accepted;
    if (accepted < num_drafts) {
      const Stopwatch watch;
      parts_.runner.rewind(sequence.cache.slot, sequence.pos());
      watch.add_to(model_);
    }
    draft_policy_.add(sequence.acceptance, num_drafts, accepted);
    sequence.drafted += num_drafts;
    sequence.accepted += accepted;
    stats_.drafted += num_drafts;
    stats_.accepted += accepted;
    const int64_t count = std::ssize(update.tokens);
    stats_.generated_tokens += count;
    queue_.charge(sequence.request->request.client, count);
  }
  keep_state(sequence, reason.has_value());
  if (reason) {
    end(sequence, *reason, std::move(update));
  } else if (!update.tokens.empty()) {
    deliver(sequence, std::move(update));
  }
}

// A token that was drawn; a reason when the answer ends with it.
std::optional<FinishReason> Scheduler::take_token(Sequence& sequence,
                                                  Sampled sampled,
                                                  Update& update) {
  const Request& request = sequence.request->request;
  const auto prompt_size = request.prompt.size();
  if (!sequence.mask_error.empty()) throw Error(sequence.mask_error);
  HADAL_CHECK(sampled.token != -1,
              "scheduler: no token can be drawn: of all that may follow, no "
              "logit is a number");
  HADAL_CHECK(sampled.token >= 0 && sampled.token < info_.vocab_size, "scheduler: drew token ",
              sampled.token);
  sampled.token = sequence.filter->decide(sampled.token);
  sequence.tokens.push_back(sampled.token);
  OutputToken& out = update.tokens.emplace_back();
  out.token = sampled.token;
  out.logprob = sampled.logprob;
  out.top = std::move(sampled.top);
  out.sampled_logprob = sampled.sampled_logprob;
  const auto answered = static_cast<int64_t>(sequence.tokens.size() - prompt_size);
  const std::vector<int64_t>& ends = sequence.request->ends;
  if (std::ranges::find(ends, sampled.token) != ends.end()) {
    if (sampled.token != info_.eos_token) update.stop_token = sampled.token;
    out.text = sequence.filter->finish();
    return FinishReason::kStop;
  }
  AnswerFilter::Accepted accepted = sequence.filter->accept(sampled.token);
  out.text = std::move(accepted.text);
  if (accepted.verdict == AnswerFilter::Verdict::kStopString) {
    update.matched_stop = std::move(accepted.matched_stop);
    return FinishReason::kStopString;
  }
  const bool complete = accepted.verdict == AnswerFilter::Verdict::kComplete;
  if (!complete && answered < request.max_tokens && sequence.num_tokens() < max_tokens_) {
    return std::nullopt;
  }
  out.text += sequence.filter->finish();
  return complete ? FinishReason::kStop : FinishReason::kLength;
}

// The prompt is computed: the other choices begin from its pages and state, each with its own
// token. Those for which there is no room wait like anybody else, and draw theirs again.
void Scheduler::fork_choices(Sequence& leader, std::span<Sampled> drawn) {
  RequestState& request = *leader.request;
  auto next = drawn.begin();
  for (Sequence* choice : request.awaiting()) {
    Sequence& other = *choice;
    Sampled* sampled = drawn.empty() ? nullptr : &*next++;
    std::optional<CachedSequence> cache;
    if (has_place() && pages_spare() > 1) cache = cache_.fork(leader.cache);
    if (!cache) {
      enqueue(other, true);
      continue;
    }
    other.cache = std::move(*cache);
    insert_running(other);
    Update update;
    const std::optional<FinishReason> reason =
        sampled == nullptr ? FinishReason::kLength : take_token(other, std::move(*sampled), update);
    const int64_t count = std::ssize(update.tokens);
    stats_.generated_tokens += count;
    queue_.charge(request.request.client, count);
    if (reason) {
      end(other, *reason, std::move(update));
    } else {
      deliver(other, std::move(update));
    }
  }
}

// At snapshot positions, before a prompt's last token and where a conversation ends; for stores
// that keep all windows at every page's end, too.
void Scheduler::keep_state(Sequence& sequence, bool ends) {
  if (!sequence.cache.use_tree) return;
  cache_.store_window(sequence.cache, sequence.tokens);
  const bool before_last =
      options_.snapshot_prompts && sequence.pos() == sequence.request->prompt_size() - 1;
  if (!ends && !before_last && sequence.pos() % cache_.snapshot_interval() != 0) return;
  cache_.publish(sequence.cache, sequence.tokens,
                 ends ? StateKind::kEnd : (before_last ? StateKind::kPrompt : StateKind::kPage));
}

}  // namespace hadal::engine_core
