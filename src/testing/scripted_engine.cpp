#include "testing/scripted_engine.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "text/chat_tokens.h"
#include "text/tool_calls.h"

namespace hadal::testing {

using engine_core::FinishReason;

namespace {

/// A byte 0x1A before a special token's literal makes it ordinary text.
std::vector<int32_t> script_tokens(const text::Tokenizer& tokenizer, std::string_view script) {
  std::vector<int32_t> tokens;
  while (!script.empty()) {
    const size_t mark = std::min(script.find('\x1a'), script.size());
    tokenizer.encode(script.substr(0, mark), text::SpecialTokens::kRecognise, tokens);
    script.remove_prefix(std::min(mark + 1, script.size()));
    if (const auto [pos, size] = text::find_special(script); pos == 0 && size > 0) {
      tokenizer.encode(script.substr(0, size), text::SpecialTokens::kAsText, tokens);
      script.remove_prefix(size);
    }
  }
  return tokens;
}

}  // namespace

ScriptedEngine::ScriptedEngine(const text::Tokenizer& tokenizer,
                               Script script,
                               ScriptedEngineOptions options)
    : tokenizer_(tokenizer), script_(std::move(script)), options_(options) {
  info_.model_name = "scripted";
  info_.vocab_size = tokenizer.vocab_size();
  info_.max_context = options.max_context;
  info_.max_choices = 8;
  info_.eos_token = tokenizer.id_of(text::kEos);
  if (!options_.inline_steps) thread_ = std::thread([this] { loop(); });
}

ScriptedEngine::~ScriptedEngine() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

engine_core::Submitted ScriptedEngine::submit(engine_core::Request request,
                                              std::shared_ptr<engine_core::Sink> sink,
                                              uint64_t* id) {
  HADAL_INPUT_CHECK(!request.prompt.empty() && request.max_tokens >= 0, "an empty request");
  HADAL_INPUT_CHECK(std::ssize(request.prompt) + request.max_tokens <= info_.max_context,
                    "the context is too long");
  Running running;
  for (int64_t choice = 0; choice < request.n; ++choice) {
    ChoiceState state;
    const std::string text = script_(request, choice);
    if (text.starts_with('!')) {
      state.error = text.substr(1);
    } else {
      state.tokens = script_tokens(tokenizer_, text);
    }
    state.text = std::make_unique<engine_core::AnswerText>(tokenizer_, request);
    running.choices.push_back(std::move(state));
  }
  // Of the i-th token -i, that the likeliest is the token's predecessor.
  if (request.prompt_logprobs >= 0) {
    auto scores = std::make_shared<std::vector<engine_core::TokenScore>>(request.prompt.size());
    for (size_t i = 1; i < scores->size(); ++i) {
      (*scores)[i] = {.logprob = -static_cast<double>(i), .rank = 2, .top = {}};
      if (request.prompt_logprobs > 0)
        (*scores)[i].top.push_back({.token = request.prompt[i - 1], .logprob = -0.25});
    }
    running.scores = std::move(scores);
  }
  running.sink = std::move(sink);
  const std::lock_guard lock(mutex_);
  if (running_.size() >= options_.max_requests) return engine_core::Submitted::kQueueFull;
  if (seen_.size() >= 1000) seen_.erase(seen_.begin(), seen_.begin() + 500);
  seen_.push_back(request);
  stats_.prompt_tokens += std::ssize(request.prompt);
  running.request = std::move(request);
  *id = next_id_++;
  if (options_.inline_steps) {
    while (!step(running)) {
    }
    return engine_core::Submitted::kAccepted;
  }
  running_.emplace(*id, std::move(running));
  changed_.notify_all();
  return engine_core::Submitted::kAccepted;
}

void ScriptedEngine::cancel(uint64_t id) {
  const std::lock_guard lock(mutex_);
  const auto found = running_.find(id);
  if (found == running_.end() || found->second.cancelled) return;
  found->second.cancelled = true;
  ++stats_.cancelled;
  changed_.notify_all();
}

engine_core::EngineStats ScriptedEngine::stats() const {
  const std::lock_guard lock(mutex_);
  engine_core::EngineStats stats = stats_;
  stats.running = std::ssize(running_);
  return stats;
}

void ScriptedEngine::hold(bool held) {
  const std::lock_guard lock(mutex_);
  held_ = held;
  changed_.notify_all();
}

bool ScriptedEngine::wait_cancelled(int64_t count) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(20),
                           [&] { return stats_.cancelled >= count; });
}

bool ScriptedEngine::wait_running(int64_t count) const {
  std::unique_lock lock(mutex_);
  return changed_.wait_for(lock, std::chrono::seconds(20),
                           [&] { return std::ssize(running_) >= count; });
}

std::vector<engine_core::Request> ScriptedEngine::requests() const {
  const std::lock_guard lock(mutex_);
  return seen_;
}

engine_core::Update ScriptedEngine::next_token(const Running& running, ChoiceState& choice) {
  engine_core::Update update;
  update.cache = {std::ssize(running.request.prompt), std::ssize(running.request.prompt) / 2, 0,
                  "tail"};
  update.prompt_scores = running.scores;
  update.weights = weights_;
  if (running.cancelled) {
    update.finish = FinishReason::kCancelled;
  } else if (!choice.error.empty()) {
    update.finish = FinishReason::kError;
    update.error = choice.error;
  } else if (static_cast<int64_t>(choice.next) >= running.request.max_tokens) {
    update.finish = FinishReason::kLength;
  } else {
    engine_core::OutputToken token;
    const bool ends = choice.next >= choice.tokens.size();
    token.token = ends ? info_.eos_token : choice.tokens[choice.next];
    ++choice.next;
    const auto& stops = running.request.stop_tokens;
    if (ends) {
      update.finish = FinishReason::kStop;
      token.text = choice.text->finish();
    } else if (std::ranges::count(stops, token.token) > 0) {
      update.finish = FinishReason::kStop;
      update.stop_token = token.token;
      token.text = choice.text->finish();
    } else {
      token.text = choice.text->push(token.token);
      if (static_cast<int64_t>(choice.next) == running.request.max_tokens)
        token.text += choice.text->finish();
      if (choice.text->stopped()) {
        update.finish = FinishReason::kStopString;
        update.matched_stop = *choice.text->matched();
      }
    }
    if (running.request.top_logprobs >= 0) {
      token.logprob = -0.5;
      for (int64_t i = 0; i < running.request.top_logprobs; ++i)
        token.top.push_back({token.token, -0.5 - static_cast<double>(i)});
    }
    if (running.request.sampled_logprobs) token.sampled_logprob = -0.25;
    update.tokens.push_back(std::move(token));
    ++stats_.generated_tokens;
  }
  update.completion_tokens = static_cast<int64_t>(choice.next);
  return update;
}

bool ScriptedEngine::step(Running& running) {
  bool over = true;
  for (size_t i = 0; i < running.choices.size(); ++i) {
    ChoiceState& choice = running.choices[i];
    if (choice.done) continue;
    engine_core::Update update = next_token(running, choice);
    update.choice = static_cast<int64_t>(i);
    choice.done = update.finish.has_value();
    over = over && choice.done;
    running.sink->on_update(std::move(update));
  }
  if (over) ++stats_.finished;
  return over;
}

void ScriptedEngine::loop() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stop_ || (!held_ && !running_.empty()); });
    if (stop_) return;
    ++stats_.steps;
    for (auto it = running_.begin(); it != running_.end();)
      it = step(it->second) ? running_.erase(it) : std::next(it);
    changed_.notify_all();
    lock.unlock();
    std::this_thread::sleep_for(options_.step);
    lock.lock();
  }
}

}  // namespace hadal::testing
