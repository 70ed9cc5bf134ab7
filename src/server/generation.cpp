#include "server/generation.h"

#include <algorithm>
#include <iterator>
#include <random>

#include "base/log.h"
#include "text/chat_tokens.h"

namespace hadal::server {

namespace {

/// Prompts of one request in the engine at a time, so that a long list does not fill its queue.
constexpr int64_t kPromptsAtOnce = 64;

std::mt19937_64& random_source() {
  thread_local std::mt19937_64 source = [] {
    std::random_device device;
    std::seed_seq seeds{device(), device(), device(), device()};
    return std::mt19937_64(seeds);
  }();
  return source;
}
}  // namespace

uint64_t random_seed() { return random_source()(); }

std::string random_id(std::string_view prefix) {
  constexpr std::string_view kAlphabet = "abcdefghijklmnopqrstuvwxyz0123456789";
  std::string id(prefix);
  for (int i = 0; i < 24; ++i) id += kAlphabet[random_source()() % kAlphabet.size()];
  return id;
}

int64_t Answer::completion_tokens() const {
  int64_t sum = 0;
  for (const Choice& choice : choices) sum += choice.completion_tokens;
  return sum;
}
int64_t Answer::reasoning_tokens() const {
  int64_t sum = 0;
  for (const Choice& choice : choices) sum += choice.reasoning_tokens;
  return sum;
}

Ending Choice::ending() const {
  if (finish == engine_core::FinishReason::kLength) return Ending::kLength;
  if (!calls.empty()) return Ending::kToolCalls;
  if (finish == engine_core::FinishReason::kStopString) return Ending::kStopString;
  return malformed.empty() ? Ending::kStop : Ending::kMalformed;
}

/// Brings updates from the engine's thread to the answer's strand.
class Generation::PostingSink final : public engine_core::Sink {
 public:
  PostingSink(std::shared_ptr<Generation> generation, size_t part)
      : generation_(std::move(generation)), part_(part) {}
  void on_update(engine_core::Update update) override {
    generation_->responder_->post(
        [generation = generation_, part = part_, update = std::move(update)] {
          generation->update(part, update);
        });
  }

 private:
  std::shared_ptr<Generation> generation_;
  size_t part_;
};

Generation::Generation(engine_core::Engine& engine,
                       const text::Tokenizer& tokenizer,
                       ApiMetrics& metrics,
                       std::shared_ptr<Responder> responder,
                       Job job,
                       Lease lease,
                       std::chrono::milliseconds ping_interval)
    : engine_(engine),
      tokenizer_(tokenizer),
      metrics_(metrics),
      responder_(std::move(responder)),
      job_(std::move(job)),
      lease_(std::move(lease)),
      ping_interval_(ping_interval),
      began_(std::chrono::steady_clock::now()) {
  answer_.id = job_.id;
  answer_.model = job_.model;
  answer_.created = std::chrono::duration_cast<std::chrono::seconds>(
                        std::chrono::system_clock::now().time_since_epoch())
                        .count();
  for (const engine_core::Request& request : job_.requests) {
    parts_.push_back({.first_choice = open_choices_, .running = request.n});
    open_choices_ += static_cast<size_t>(request.n);
    answer_.prompt_tokens += std::ssize(request.prompt);
  }
  answer_.choices.resize(open_choices_);
  progress_.resize(open_choices_);
  if (!job_.chat) return;
  if (const auto id = tokenizer.find(text::kThinkEnd)) think_end_ = *id;
  if (const auto id = tokenizer.find(text::kDsml)) marker_ = *id;
  for (Progress& progress : progress_) {
    text::CompletionParserOptions options{.tools = job_.tools};
    if (job_.certain_calls) options.hold_bytes = 0;
    progress.parser.emplace(job_.mode, std::move(options));
    progress.in_reasoning = job_.mode == text::ThinkingMode::kThinking;
  }
}

/// Hands the next request to the engine. Errors: RequestError where it refuses.
uint64_t Generation::submit_next() {
  const size_t part = num_submitted_;
  // Kept where it may be refused and tried again.
  engine_core::Request request =
      parts_.size() > 1 ? job_.requests[part] : std::move(job_.requests[part]);
  // Counted before the first update can come.
  ++num_submitted_;
  ++running_parts_;
  const auto refuse = [&](const RequestError& error) {
    --num_submitted_;
    --running_parts_;
    throw RequestError(error);
  };
  uint64_t id = 0;
  try {
    const engine_core::Submitted submitted = engine_.submit(
        std::move(request), std::make_shared<PostingSink>(shared_from_this(), part), &id);
    if (submitted == engine_core::Submitted::kStopping)
      refuse(RequestError(503, "the server is stopping"));
    if (submitted == engine_core::Submitted::kQueueFull)
      refuse(RequestError(429, "the queue is full; try again later", "", "queue_full"));
  } catch (const RequestError&) {
    throw;
  } catch (const InputError& error) {
    refuse(RequestError(400, error.what()));
  }
  job_.requests[part] = {};
  return id;
}

void Generation::start() {
  std::vector<uint64_t> ids;
  try {
    while (num_submitted_ < parts_.size() && running_parts_ < kPromptsAtOnce)
      ids.push_back(submit_next());
  } catch (const RequestError& error) {
    // What was accepted before ends unheard.
    responder_->post([self = shared_from_this()] { self->over_ = true; });
    for (const uint64_t earlier : ids) engine_.cancel(earlier);
    if (error.status() == 429) metrics_.queue_full.add();
    throw;
  }
  responder_->post([self = shared_from_this(), ids] { self->accepted(ids); });
  responder_->on_close([self = shared_from_this(), ids] {
    self->over_ = true;
    for (const uint64_t id : ids) self->engine_.cancel(id);
    self->cancel_all();
    self->metrics_.cancelled.add();
    self->lease_.reset();
  });
  responder_->on_stop([self = shared_from_this()] {
    if (!self->over_) self->fail(RequestError(503, "the server is stopping"));
  });
}

/// The prompts that did not go with the first, as there is room.
void Generation::submit_more() {
  while (!over_ && num_submitted_ < parts_.size() && running_parts_ < kPromptsAtOnce) {
    try {
      ids_.push_back(submit_next());
    } catch (const RequestError& error) {
      // Tried again when the next of ours ends.
      if (error.status() == 429 && running_parts_ > 0) return;
      return fail(error);
    }
  }
}

void Generation::accepted(std::vector<uint64_t> ids) {
  ids_ = std::move(ids);
  if (over_) return cancel_all();
  accepted_ = true;
  if (job_.stream) begin_stream();
  for (const auto& [part, news] : std::exchange(early_, {})) update(part, news);
}

void Generation::update(size_t part, const engine_core::Update& update) {
  if (over_) return;
  if (!accepted_) {
    early_.emplace_back(part, update);
    return;
  }
  const size_t index = parts_[part].first_choice + static_cast<size_t>(update.choice);
  HADAL_CHECK(index < progress_.size(), "server: an update of choice ", update.choice);
  if (update.finish == engine_core::FinishReason::kError)
    return fail(RequestError(500, update.error.empty() ? "the engine failed" : update.error));
  if (update.finish == engine_core::FinishReason::kDeadline)
    return fail(RequestError(504, "the request took longer than the server allows"));
  if (update.finish == engine_core::FinishReason::kCancelled)
    return fail(RequestError(503, "the request was cancelled"));
  if (first_) {
    first_ = false;
    const auto waited = std::chrono::steady_clock::now() - began_;
    answer_.first_token_seconds = std::chrono::duration<double>(waited).count();
    metrics_.first_token.observe(waited);
  }
  answer_.choices[index].weights = update.weights;
  if (update.prompt_scores) answer_.choices[index].prompt_scores = update.prompt_scores;
  if (!progress_[index].started) {
    progress_[index].started = true;
    if (update.choice == 0) {
      answer_.cached_tokens += update.cache.cached_tokens;
      answer_.disk_tokens += update.cache.disk_tokens;
      if (answer_.miss.empty()) answer_.miss = update.cache.miss;
    }
  }
  if (streaming_ && !std::exchange(begun_, true)) job_.format->begin(answer_, out_);
  if (update.view && index == 0 && job_.on_view) job_.on_view(*update.view);
  if (!progress_[index].done) {
    answer_.choices[index].completion_tokens = update.completion_tokens;
    for (const engine_core::OutputToken& token : update.tokens) {
      take_token(index, token);
      if (progress_[index].done) break;
    }
  }
  if (update.finish && !progress_[index].done) {
    answer_.choices[index].matched_stop = update.matched_stop;
    answer_.choices[index].stop_token = update.stop_token;
    finish_choice(index, *update.finish);
  }
  if (streaming_ && !out_.empty()) responder_->write(std::exchange(out_, {}));
  if (open_choices_ == 0) return close();
  if (update.finish && --parts_[part].running == 0) {
    --running_parts_;
    submit_more();
  }
}

void Generation::take_token(size_t index, const engine_core::OutputToken& token) {
  Progress& progress = progress_[index];
  Choice& choice = answer_.choices[index];
  if (job_.keep_token_ids) choice.token_ids.push_back(token.token);
  if (job_.keep_sampled_logprobs) choice.sampled_logprobs.push_back(token.sampled_logprob);
  if (progress.in_reasoning) {
    ++choice.reasoning_tokens;
    if (token.token == think_end_ || token.token == marker_) progress.in_reasoning = false;
  }
  const bool hidden = token.text.empty() && tokenizer_.is_added(static_cast<int32_t>(token.token));
  if (!job_.chat || !hidden) progress.pending.push_back(token);
  std::vector<text::CompletionEvent> events;
  if (progress.parser) {
    events = progress.parser->push(token.text);
    if (tokenizer_.is_added(static_cast<int32_t>(token.token)))
      take_special(token.token, *progress.parser, events);
  } else if (!token.text.empty()) {
    events.push_back({Format::Kind::kContent, token.text, {}});
  }
  take_events(index, events);
}

/// EOS is told to the parser where the choice ends; one that the client ignores means nothing.
void Generation::take_special(int64_t token,
                              text::CompletionParser& parser,
                              std::vector<text::CompletionEvent>& events) {
  if (token == engine_.info().eos_token) return;
  for (text::CompletionEvent& event :
       parser.push_special(tokenizer_.token_bytes(static_cast<int32_t>(token))))
    events.push_back(std::move(event));
}

void Generation::take_events(size_t index, std::vector<text::CompletionEvent>& events) {
  Progress& progress = progress_[index];
  Choice& choice = answer_.choices[index];
  for (text::CompletionEvent& event : events) {
    // Where one call may come, the answer ends behind it, whatever came with its last token.
    if (job_.one_call && !choice.calls.empty()) break;
    if (event.kind != Format::Kind::kContent && event.kind != Format::Kind::kReasoning) {
      progress.pending.clear();
      take_call_event(index, event);
      continue;
    }
    const bool is_content = event.kind == Format::Kind::kContent;
    (is_content ? choice.content : choice.reasoning) += event.text;
    auto& info = is_content ? choice.content_tokens_info : choice.reasoning_tokens_info;
    for (engine_core::OutputToken& token : progress.pending) info.push_back(std::move(token));
    progress.pending.clear();
    if (streaming_) job_.format->text(answer_, index, event.kind, event.text, out_);
  }
  if (job_.one_call && !choice.calls.empty() && !progress.done)
    finish_choice(index, engine_core::FinishReason::kStop);
}

void Generation::take_call_event(size_t index, const text::CompletionEvent& event) {
  Choice& choice = answer_.choices[index];
  if (event.kind == Format::Kind::kCallBegin) {
    choice.open_call = {random_id("call_"), event.call.name, {}};
    if (streaming_) job_.format->call_begun(answer_, index, out_);
  } else if (event.kind == Format::Kind::kToolCall) {
    if (job_.calls) job_.calls->remember(choice.open_call->id, event.call);
    choice.calls.push_back(std::move(*choice.open_call));
    choice.open_call.reset();
    if (streaming_) job_.format->call_ended(answer_, index, out_);
  } else if (event.kind == Format::Kind::kCallDropped) {
    if (streaming_) job_.format->call_dropped(answer_, index, out_);
    choice.open_call.reset();
    ++choice.dropped_calls;
  } else {
    choice.open_call->arguments += event.text;
    if (streaming_) job_.format->call_arguments(answer_, index, event.text, out_);
  }
}

void Generation::finish_choice(size_t index, engine_core::FinishReason reason) {
  Progress& progress = progress_[index];
  Choice& choice = answer_.choices[index];
  progress.done = true;  // before events come that could end it again
  if (progress.parser) {
    std::vector<text::CompletionEvent> events;
    const bool whole =
        reason == engine_core::FinishReason::kStop && !(job_.one_call && !choice.calls.empty());
    if (whole) events = progress.parser->push_special(text::kEos);
    const text::Completion completion = progress.parser->finish(events);
    take_events(index, events);
    if (completion.lost) choice.malformed = completion.error;
    choice.open_reasoning = completion.open_reasoning;
    if (completion.open_reasoning) metrics_.open_reasoning.add();
    if (completion.lost) {
      metrics_.malformed.add();
    } else if (whole && !completion.ok) {
      metrics_.irregular.add();
    }
  }
  // A plain answer shows all that was drawn: its end, and what a stop string took away.
  if (!job_.chat) {
    std::ranges::move(progress.pending, std::back_inserter(choice.content_tokens_info));
    progress.pending.clear();
  }
  choice.finish = reason;
  --open_choices_;
  if (streaming_) job_.format->finished(answer_, index, out_);
}

/// The client sees the answer's head while the prompt is still waiting or read.
void Generation::begin_stream() {
  streaming_ = true;
  HttpResponse head;
  head.content_type = "text/event-stream; charset=utf-8";
  head.headers = {{"Cache-Control", "no-cache"}, {"X-Accel-Buffering", "no"}};
  responder_->begin_stream(std::move(head));
  if (job_.format->begins_at_once()) {
    begun_ = true;
    job_.format->begin(answer_, out_);
  }
  // A comment where nothing is said yet: some wait for a first byte.
  if (out_.empty()) out_ += ": ping\n\n";
  responder_->write(std::exchange(out_, {}));
  if (ping_interval_.count() > 0)
    responder_->when_silent(ping_interval_, [self = shared_from_this()] { self->ping(); });
}

void Generation::ping() {
  if (over_) return;
  job_.format->ping(out_);
  responder_->write(std::exchange(out_, {}));
}

void Generation::close() {
  over_ = true;
  cancel_all();  // choices that ended before the engine knew
  lease_.reset();
  metrics_.finished.add();
  const auto took = std::chrono::steady_clock::now() - began_;
  answer_.seconds = std::chrono::duration<double>(took).count();
  metrics_.duration.observe(took);
  if (streaming_) {
    job_.format->end(answer_, out_);
    responder_->write(std::exchange(out_, {}));
    responder_->end_stream();
  } else {
    HttpResponse response;
    response.body = job_.format->whole(answer_);
    responder_->send(std::move(response));
  }
}

void Generation::fail(const RequestError& error) {
  over_ = true;
  cancel_all();
  lease_.reset();
  metrics_.failed.add();
  log::warn("server", answer_.id, ": ", error.what());
  if (streaming_) {
    if (!std::exchange(begun_, true)) job_.format->begin(answer_, out_);
    job_.format->stream_error(error, out_);
    responder_->write(std::exchange(out_, {}));
    responder_->end_stream();
  } else {
    responder_->send(job_.format->error(error));
  }
}

void Generation::cancel_all() {
  for (const uint64_t id : ids_) engine_.cancel(id);
}

}  // namespace hadal::server
