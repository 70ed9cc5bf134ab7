#include "engine_core/schedule/scheduler.h"

#include <algorithm>
#include <exception>
#include <iterator>
#include <optional>

#include "base/check.h"
#include "base/log.h"
#include "base/math.h"
#include "engine_core/answer/answer_cuts.h"
#include "engine_core/schedule/scheduler_state.h"

namespace hadal::engine_core {
namespace {

constexpr int kChoiceBits = 16;  ///< of an arrival number; the rest is the request's

void check_sampling(const Sampling& sampling, int64_t vocab_size) {
  HADAL_INPUT_CHECK(sampling.temperature >= 0, "request: temperature must be at least 0, found ",
                    sampling.temperature);
  HADAL_INPUT_CHECK(sampling.top_p > 0 && sampling.top_p <= 1,
                    "request: top_p must be in (0, 1], found ", sampling.top_p);
  HADAL_INPUT_CHECK(sampling.min_p >= 0 && sampling.min_p < 1,
                    "request: min_p must be in [0, 1), found ", sampling.min_p);
  HADAL_INPUT_CHECK(sampling.top_k >= 0, "request: top_k must be at least 0, found ",
                    sampling.top_k);
  HADAL_INPUT_CHECK(sampling.repetition_penalty > 0,
                    "request: repetition_penalty must be above 0, found ",
                    sampling.repetition_penalty);
  for (const double penalty : {sampling.presence_penalty, sampling.frequency_penalty}) {
    HADAL_INPUT_CHECK(penalty >= -2 && penalty <= 2,
                      "request: penalties must be in [-2, 2], found ", penalty);
  }
  for (const auto& [token, bias] : sampling.logit_bias) {
    HADAL_INPUT_CHECK(token >= 0 && token < vocab_size, "request: logit_bias for token ", token,
                      ", expected less than ", vocab_size);
  }
}

}  // namespace

void Scheduler::PreparedDeleter::operator()(Prepared* prepared) const { delete prepared; }

Scheduler::Scheduler(const EngineInfo& info,
                     const SchedulerOptions& options,
                     const SchedulerParts& parts)
    : info_(info),
      weights_(
          std::make_shared<WeightsVersion>(WeightsVersion{.number = 0, .digest = info.weights})),
      options_(options),
      parts_(parts),
      cache_(parts.memory, parts.runner, options.cache, parts.store),
      draft_policy_(options.drafts_in_blocks ? std::max<int64_t>(options.max_drafts, 1) : 1),
      prompt_pace_(options.prompt_seconds),
      max_tokens_(
          std::min(info.max_context, parts.memory.num_pages() * parts.memory.page_tokens())) {
  HADAL_CHECK(options.max_running > 0 && options.step_tokens > 0 && options.prompt_tokens > 0 &&
                  options.max_waiting > 0 && options.load_pages > 0 &&
                  parts.memory.num_slots() > 0 && max_tokens_ > 1,
              "scheduler: nothing could ever run");
  HADAL_CHECK(options.max_drafts >= 0 && options.max_drafts <= parts.runner.slack(),
              "scheduler: ", options.max_drafts, " drafts, the model can go back ",
              parts.runner.slack());
  HADAL_CHECK(info.max_choices > 0 && info.max_choices < (int64_t{1} << kChoiceBits),
              "scheduler: max_choices ", info.max_choices);
}

Scheduler::~Scheduler() = default;

Scheduler::PreparedPtr Scheduler::prepare(Request request, std::shared_ptr<Sink> sink) const {
  HADAL_INPUT_CHECK(!request.prompt.empty(), "request: the prompt has no tokens");
  const auto prompt_size = static_cast<int64_t>(request.prompt.size());
  const int64_t most = request.max_tokens == 0 ? max_tokens_ : max_tokens_ - 1;
  HADAL_INPUT_CHECK(prompt_size <= most, "request: a prompt of ", prompt_size,
                    " tokens, expected at most ", most);
  for (const int64_t token : request.prompt) {
    HADAL_INPUT_CHECK(token >= 0 && token < info_.vocab_size, "request: token ", token,
                      " in the prompt, expected less than ", info_.vocab_size);
  }
  HADAL_INPUT_CHECK(request.max_tokens >= 0, "request: max_tokens must be at least 0, found ",
                    request.max_tokens);
  HADAL_INPUT_CHECK(request.n >= 1 && request.n <= info_.max_choices,
                    "request: n must be between 1 and ", info_.max_choices, ", found ", request.n);
  for (const int64_t token : request.stop_tokens) {
    HADAL_INPUT_CHECK(token >= 0 && token < info_.vocab_size, "request: stop token ", token,
                      ", expected less than ", info_.vocab_size);
  }
  HADAL_INPUT_CHECK(request.min_tokens >= 0 && request.min_tokens <= request.max_tokens,
                    "request: min_tokens ", request.min_tokens, " of at most ", request.max_tokens);
  for (const int64_t top : {request.top_logprobs, request.prompt_logprobs}) {
    HADAL_INPUT_CHECK(top >= -1 && top <= info_.vocab_size, "request: top log probabilities ", top);
  }
  HADAL_INPUT_CHECK(request.prompt_logprobs_from >= 0 && request.prompt_logprobs_from < prompt_size,
                    "request: log probabilities from token ", request.prompt_logprobs_from,
                    " of a prompt of ", prompt_size);
  check_sampling(request.sampling, info_.vocab_size);
  PreparedPtr prepared(new Prepared{std::move(request), std::move(sink), {}});
  for (int64_t choice = 0; choice < prepared->request.n; ++choice) {
    prepared->filters.push_back(parts_.filters.create(prepared->request));
  }
  return prepared;
}

void Scheduler::add(uint64_t id, PreparedPtr prepared) {
  HADAL_CHECK(requests_.empty() || id > requests_.rbegin()->first, "scheduler: request ", id,
              " comes late");
  auto state = std::make_unique<RequestState>();
  state->id = id;
  state->request = std::move(prepared->request);
  state->request.cache_key.client = state->request.client;
  state->sink = std::move(prepared->sink);
  state->num_open = state->request.n;
  state->ends = state->request.stop_tokens;
  if (!state->request.ignore_eos) state->ends.push_back(info_.eos_token);
  if (state->request.prompt_logprobs >= 0)
    // Nothing is before the first token.
    state->scores = std::make_shared<std::vector<TokenScore>>(
        std::max<int64_t>(state->request.prompt_logprobs_from, 1));
  for (int64_t choice = 0; choice < state->request.n; ++choice) {
    auto sequence = std::make_unique<Sequence>();
    sequence->request = state.get();
    sequence->choice = choice;
    sequence->arrival = (id << kChoiceBits) + static_cast<uint64_t>(choice);
    sequence->tokens = state->request.prompt;
    sequence->filter = std::move(prepared->filters[static_cast<size_t>(choice)]);
    state->sequences.push_back(std::move(sequence));
  }
  if (state->request.deadline) deadlines_.emplace(*state->request.deadline, id);
  if (!holds_waiting_) enqueue(*state->sequences.front(), false);
  ++num_waiting_requests_;
  requests_.emplace(id, std::move(state));
}

void Scheduler::cancel(uint64_t id) {
  const auto found = requests_.find(id);
  if (found == requests_.end()) return;
  break_off(*found->second, FinishReason::kCancelled);
  forget_finished();
}

void Scheduler::cancel_all() {
  for (const auto& [id, request] : requests_) end_request(*request, FinishReason::kCancelled, "");
  forget_finished();
}

void Scheduler::fail_all(const std::string& what) {
  planned_.clear();
  for (const auto& [id, request] : requests_) fail(*request, what);
  forget_finished();
}

void Scheduler::expire() {
  while (!deadlines_.empty() && deadlines_.begin()->first <= Clock::now()) {
    const uint64_t id = deadlines_.begin()->second;
    deadlines_.erase(deadlines_.begin());
    break_off(*requests_.at(id), FinishReason::kDeadline);
  }
  for (const uint64_t id : broken_) {
    const auto found = requests_.find(id);
    if (found != requests_.end()) break_off(*found->second, FinishReason::kCancelled);
  }
  broken_.clear();
  forget_finished();
}

void Scheduler::enqueue(Sequence& sequence, bool resumes) {
  const Request& request = sequence.request->request;
  queue_.push({.arrival = sequence.arrival,
               .priority = request.priority,
               .client = request.client,
               .resumes = resumes});
  waiting_.emplace(sequence.arrival, &sequence);
  sequence.phase = Sequence::Phase::kWaiting;
  blocked_front_ = 0;
}

bool Scheduler::has_place() const {
  return static_cast<int64_t>(running_.size()) < options_.max_running &&
         cache_.slots().num_free() > 0;
}

// Pages the sequence still needs to draw its next token.
int64_t Scheduler::pages_owed(const Sequence& sequence) const {
  const int64_t needed = cache_.num_pages_for(std::min(sequence.num_tokens() + 1, max_tokens_));
  return std::max(needed - sequence.cache.num_pages(), int64_t{0});
}

// Pages nobody who runs has or is about to need, less a few for the answers to grow into.
int64_t Scheduler::pages_spare() const {
  int64_t spare = cache_.num_available();
  for (const Sequence* sequence : running_) spare -= pages_owed(*sequence);
  return running_.empty() ? spare : spare - 1 - static_cast<int64_t>(running_.size()) / 8;
}

void Scheduler::admit() {
  while (const std::optional<uint64_t> front = queue_.front()) {
    Sequence& sequence = *waiting_.at(*front);
    if (!has_place()) {
      const Sequence* worst = worst_running();
      if (worst == nullptr ||
          worst->request->request.priority >= sequence.request->request.priority) {
        return;
      }
    } else if (blocked_front_ == *front && blocked_spare_ == pages_spare()) {
      return;
    }
    if (!try_admit(sequence)) {
      blocked_front_ = *front;
      blocked_spare_ = pages_spare();
      return;
    }
  }
}

bool Scheduler::try_admit(Sequence& sequence) {
  const bool use_tree = sequence.request->request.use_prefix_cache;
  const int64_t num_tokens = std::min(sequence.num_tokens() + 1, max_tokens_);
  const std::span<const int64_t> tokens = reusable(sequence);
  PrefixMatch match = cache_.match(tokens, use_tree);
  if (!has_place() ||
      (!running_.empty() && cache_.pages_taken(match, num_tokens) > pages_spare())) {
    if (!make_room_for(sequence, cache_.pages_taken(match, num_tokens))) return false;
    match = cache_.match(tokens, use_tree);
  }
  if (!cache_.open(tokens, match, use_tree, sequence.cache, sequence.opened,
                   &sequence.request->request.cache_key))
    return false;
  RequestState& request = *sequence.request;
  if (use_tree && request.wants_scores() && sequence.opened.cached_tokens == 0)
    sequence.opened.miss = "scored";
  if (!request.admitted) {
    request.admitted = true;
    request.weights = weights_;
    --num_waiting_requests_;
    request.report.prompt_tokens = request.prompt_size();
    stats_.prompt_tokens += request.prompt_size();
    queue_.charge(request.request.client, request.prompt_size());
    request.reporter = &sequence;
    add_cached(request, sequence.opened);
  }
  start(sequence);
  return true;
}

// What the first of its sequences to run was spared.
void Scheduler::add_cached(RequestState& request, const SequenceCache::Opened& opened) {
  const int64_t more = opened.cached_tokens - request.report.cached_tokens;
  request.report.cached_tokens += more;
  request.report.disk_tokens = opened.disk_tokens;
  request.report.miss = opened.miss;
  stats_.cached_tokens += more;
  stats_.disk_tokens += opened.disk_tokens;
  queue_.charge(request.request.client, -more);
}

// A few pages for those whose prefixes are being loaded, in turn.
void Scheduler::load_prefixes() {
  std::vector<Sequence*> loading;
  std::ranges::copy_if(running_, std::back_inserter(loading), [&](const Sequence* sequence) {
    return cache_.loads(sequence->cache) && !cache_.follows(sequence->cache);
  });
  if (loading.empty()) return;
  const int64_t share = ceil_div(options_.load_pages, std::ssize(loading));
  int64_t left = options_.load_pages;
  size_t turn = load_turn_++;
  for (size_t i = 0; i < loading.size() && left > 0; ++i, left -= share) {
    Sequence& sequence = *loading[turn++ % loading.size()];
    if (sequence.phase != Sequence::Phase::kRunning) continue;
    RequestState& request = *sequence.request;
    bool ran_model = false;
    try {
      ran_model =
          cache_.load(sequence.cache, reusable(sequence), std::min(share, left), sequence.opened);
    } catch (const std::exception& error) {
      fail(request, error.what());
      continue;
    }
    if (!cache_.loads(sequence.cache) && request.reporter == &sequence)
      add_cached(request, sequence.opened);
    if (ran_model) return;
  }
}

// Preempts sequences of lower priority if that makes enough room.
bool Scheduler::make_room_for(const Sequence& sequence, int64_t pages_needed) {
  const int priority = sequence.request->request.priority;
  int64_t gain = 0;
  for (const Sequence* other : running_) {
    if (other->request->request.priority >= priority) continue;
    gain += other->cache.num_pages() + pages_owed(*other);
  }
  if (gain == 0 || pages_spare() + gain < pages_needed) return false;
  while (!running_.empty() && (!has_place() || pages_spare() < pages_needed)) {
    Sequence& worst = *worst_running();
    if (worst.request->request.priority >= priority) return false;
    preempt(worst, true);
  }
  return true;
}

// Its turn came: from the queue into the running ones.
void Scheduler::start(Sequence& sequence) {
  if (queue_.front() == sequence.arrival) {
    queue_.pop();
  } else {
    queue_.remove(sequence.arrival);  // preempted ones came before it
  }
  waiting_.erase(sequence.arrival);
  blocked_front_ = 0;
  insert_running(sequence);
}

void Scheduler::insert_running(Sequence& sequence) {
  const auto before = [](const Sequence* a, const Sequence* b) {
    const int left = a->request->request.priority, right = b->request->request.priority;
    return left != right ? left > right : a->arrival < b->arrival;
  };
  running_.insert(std::ranges::upper_bound(running_, &sequence, before), &sequence);
  sequence.phase = Sequence::Phase::kRunning;
  sequence.seeks_leader = true;
}

Scheduler::Sequence* Scheduler::worst_running() const {
  return running_.empty() ? nullptr : running_.back();
}

void Scheduler::preempt(Sequence& sequence, bool keep_prefix) {
  if (sequence.request->reporter == &sequence && !cache_.loads(sequence.cache))
    sequence.request->reporter = nullptr;
  if (keep_prefix) cache_.publish(sequence.cache, sequence.tokens, StateKind::kEnd);
  cache_.close(sequence.cache);
  std::erase(running_, &sequence);
  follow(sequence, nullptr);
  leave_followers(sequence);
  sequence.chunk = 0;
  enqueue(sequence, true);
  ++stats_.preemptions;
}

void Scheduler::release(Sequence& sequence) {
  if (sequence.phase == Sequence::Phase::kRunning) {
    cache_.close(sequence.cache);
    std::erase(running_, &sequence);
    follow(sequence, nullptr);
    leave_followers(sequence);
  } else if (sequence.phase == Sequence::Phase::kWaiting) {
    queue_.remove(sequence.arrival);
    waiting_.erase(sequence.arrival);
  }
  blocked_front_ = 0;
  sequence.phase = Sequence::Phase::kEnded;
}

void Scheduler::deliver(Sequence& sequence, Update update) {
  RequestState& request = *sequence.request;
  if (request.sink == nullptr) return;
  update.choice = sequence.choice;
  update.cache = request.report;
  update.weights = request.weights;
  if (!request.wants_scores()) update.prompt_scores = request.scores;
  update.completion_tokens = sequence.num_tokens() - request.prompt_size();
  update.drafted = sequence.drafted;
  update.accepted_drafts = sequence.accepted;
  try {
    request.sink->on_update(std::move(update));
  } catch (const std::exception& error) {
    log::error("engine", "request ", request.id, ": its sink threw: ", error.what());
    request.sink = nullptr;
    broken_.push_back(request.id);
  }
}

void Scheduler::end(Sequence& sequence, FinishReason reason, Update update) {
  RequestState& request = *sequence.request;
  const bool whole = reason == FinishReason::kStop || reason == FinishReason::kStopString ||
                     reason == FinishReason::kLength;
  if (whole && request.request.context_view && sequence.cache.slot >= 0)
    update.view = parts_.runner.context_view(sequence.cache.slot);
  if (parts_.cuts != nullptr && sequence.cache.use_tree &&
      sequence.num_tokens() > request.prompt_size())
    parts_.cuts->remember(request.request.prompt,
                          std::span<const int64_t>(sequence.tokens)
                              .subspan(static_cast<size_t>(request.prompt_size())));
  release(sequence);
  update.finish = reason;
  deliver(sequence, std::move(update));
  if (--request.num_open > 0) return;
  if (!request.admitted) --num_waiting_requests_;
  const bool cancelled = reason == FinishReason::kCancelled || reason == FinishReason::kDeadline;
  ++(reason == FinishReason::kError ? stats_.failed
                                    : (cancelled ? stats_.cancelled : stats_.finished));
  finished_.push_back(request.id);
}

void Scheduler::break_off(RequestState& request, FinishReason reason) {
  for (const std::unique_ptr<Sequence>& sequence : request.sequences) {
    if (sequence->phase != Sequence::Phase::kRunning || sequence->suspect_until > sequence->pos())
      continue;
    try {
      cache_.publish(sequence->cache, sequence->tokens, StateKind::kEnd);
    } catch (const std::exception& error) {
      log::warn("engine", "request ", request.id, ": its prefix was not kept: ", error.what());
    }
  }
  end_request(request, reason, "");
}

void Scheduler::end_request(RequestState& request, FinishReason reason, const std::string& error) {
  for (const std::unique_ptr<Sequence>& sequence : request.sequences) {
    if (sequence->phase == Sequence::Phase::kEnded) continue;
    Update update;
    update.error = error;
    end(*sequence, reason, std::move(update));
  }
}

void Scheduler::fail(RequestState& request, const std::string& what) {
  log::error("engine", "request ", request.id, " failed: ", what);
  end_request(request, FinishReason::kError, what);
}

void Scheduler::forget_finished() {
  for (const uint64_t id : finished_) {
    const auto found = requests_.find(id);
    if (found->second->request.deadline) deadlines_.erase({*found->second->request.deadline, id});
    requests_.erase(found);
  }
  finished_.clear();
}

EngineStats Scheduler::stats() const {
  EngineStats stats = stats_;
  stats.running = static_cast<int64_t>(running_.size());
  stats.waiting = num_waiting_requests_;
  stats.pages_total = cache_.pages().num_pages();
  stats.pages_free = cache_.pages().num_free();
  stats.pages_cached = cache_.pages().num_cached();
  stats.state_slots_total = cache_.slots().num_slots();
  stats.state_slots_free = cache_.slots().num_free();
  stats.states = cache_.tree().num_states();
  stats.states_evicted = cache_.tree().num_evicted();
  stats.pinned_pages = cache_.tree().pins().num_pages();
  stats.pinned_keys = cache_.tree().pins().num_keys();
  stats.snapshot_pages = cache_.tree().num_snapshot_pages();
  stats.snapshot_bytes = stats.snapshot_pages * parts_.memory.page_bytes();
  const CacheMemory& memory = parts_.memory;
  stats.weights_bytes = info_.weights_bytes;
  stats.cache_bytes =
      memory.num_pages() * (memory.page_bytes() + SequenceCache::book_bytes(memory.page_tokens())) +
      memory.num_slots() * memory.state_bytes() +
      (parts_.cuts != nullptr ? parts_.cuts->max_bytes() : 0);
  stats.context_tokens = memory.num_pages() * memory.page_tokens();
  if (parts_.store != nullptr) stats.disk_bytes = parts_.store->stored_bytes();
  stats.disk_hits = cache_.counters().disk_hits;
  stats.disk_misses = cache_.counters().disk_misses;
  stats.disk_errors = cache_.counters().disk_errors;
  return stats;
}

void Scheduler::check_integrity() const {
  std::vector<const CachedSequence*> open;
  int64_t running = 0, waiting = 0, following = 0;
  for (const auto& [id, request] : requests_) {
    int64_t num_open = 0;
    for (const std::unique_ptr<Sequence>& sequence : request->sequences) {
      const bool runs = sequence->phase == Sequence::Phase::kRunning;
      HADAL_CHECK(runs == (sequence->cache.slot >= 0), "scheduler: a slot without a run");
      if (runs) open.push_back(&sequence->cache);
      running += runs ? 1 : 0;
      following += sequence->leader != nullptr ? 1 : 0;
      waiting += sequence->phase == Sequence::Phase::kWaiting ? 1 : 0;
      num_open += sequence->phase == Sequence::Phase::kEnded ? 0 : 1;
    }
    HADAL_CHECK(num_open == request->num_open && num_open > 0, "scheduler: request ", id, " has ",
                num_open, " open choices, counted ", request->num_open);
  }
  HADAL_CHECK(following == num_following_, "scheduler: ", following, " sequences follow, counted ",
              num_following_);
  HADAL_CHECK(running == static_cast<int64_t>(running_.size()) &&
                  waiting == static_cast<int64_t>(waiting_.size()) &&
                  waiting_.size() == queue_.size(),
              "scheduler: ", running, " running, ", waiting, " waiting, lists differ");
  cache_.check_integrity(open);
}

}  // namespace hadal::engine_core
