#include "apps/answer_engine.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <optional>

#include "apps/interrupt.h"
#include "base/check.h"
#include "base/math.h"
#include "engine/kv_cache.h"
#include "engine/local_engine.h"

namespace hadal::apps {
namespace {

constexpr std::chrono::milliseconds kPatience(20);  // between two looks at `stop`

engine::LocalEngineOptions engine_options(const LoadedModel& loaded,
                                          const AnswerEngineOptions& options) {
  engine::LocalEngineOptions result;
  result.numerics = loaded.numerics;
  result.max_running = options.at_once;
  // On the CPU memory is taken as it is used; elsewhere all of it at the start.
  const int64_t page = engine::page_tokens_of(loaded.config());
  result.cache_tokens = options.context > 0
                            ? options.at_once * (align_up(options.context, page) + page)
                            : loaded.config().max_position_embeddings;
  result.max_context = options.context;
  result.device = options.device;
  result.max_drafts = options.max_drafts;
  result.prompt_tokens = options.step_tokens;
  result.lazy_memory = true;
  return result;
}

Finish finish_of(engine_core::FinishReason reason) {
  switch (reason) {
    case engine_core::FinishReason::kStop:
    case engine_core::FinishReason::kStopString:
      return Finish::kStop;
    case engine_core::FinishReason::kLength:
      return Finish::kLength;
    default:
      return Finish::kInterrupted;
  }
}

}  // namespace

/// The engine's updates, handed to the command's thread.
class AnswerEngine::Inbox final : public engine_core::Sink {
 public:
  void on_update(engine_core::Update update) override {
    {
      const std::lock_guard lock(mutex_);
      updates_.push_back(std::move(update));
    }
    news_.notify_one();
  }

  /// Takes what comes in time into `answered`; true once that was the last.
  bool take(std::chrono::milliseconds time,
            Answered& answered,
            const std::function<void(const engine_core::OutputToken&)>& on_token) {
    std::optional<engine_core::Update> update = next(time);
    if (!update) return false;
    for (const engine_core::OutputToken& token : update->tokens) {
      answered.tokens.push_back(token.token);
      answered.text += token.text;
      if (on_token) on_token(token);
    }
    answered.cache = update->cache;
    if (update->prompt_scores) answered.prompt_scores = update->prompt_scores;
    if (!update->finish) return false;
    HADAL_CHECK(*update->finish != engine_core::FinishReason::kError, "engine: ", update->error);
    answered.finish = finish_of(*update->finish);
    return true;
  }

 private:
  /// Nothing when none comes in time.
  std::optional<engine_core::Update> next(std::chrono::milliseconds time) {
    std::unique_lock lock(mutex_);
    if (!news_.wait_for(lock, time, [this] { return !updates_.empty(); })) return std::nullopt;
    engine_core::Update update = std::move(updates_.front());
    updates_.pop_front();
    return update;
  }

  std::mutex mutex_;
  std::condition_variable news_;
  std::deque<engine_core::Update> updates_;
};

AnswerEngine::AnswerEngine(const LoadedModel& loaded, const AnswerEngineOptions& options)
    : options_(options) {
  const InterruptMask mask;
  engine_ = std::make_unique<engine::LocalEngine>(loaded.model, loaded.tokenizer, "",
                                                  engine_options(loaded, options));
}

AnswerEngine::~AnswerEngine() = default;

int64_t AnswerEngine::room_behind(int64_t prompt_tokens, const std::string& origin) const {
  const int64_t context = engine_->engine().info().max_context;
  HADAL_INPUT_CHECK(prompt_tokens > 0, origin, ": the text has no tokens");
  HADAL_INPUT_CHECK(prompt_tokens < context, origin, ": the text has ", prompt_tokens,
                    " tokens, the model's last position is ", context);
  return context - prompt_tokens;
}

std::pair<std::shared_ptr<AnswerEngine::Inbox>, uint64_t> AnswerEngine::hand_in(
    engine_core::Request request) {
  auto inbox = std::make_shared<Inbox>();  // the engine's as well, until the answer's end
  uint64_t id = 0;
  const auto submitted = engine_->engine().submit(std::move(request), inbox, &id);
  HADAL_CHECK(submitted == engine_core::Submitted::kAccepted, "engine: takes no requests");
  return {std::move(inbox), id};
}

Answered AnswerEngine::answer(engine_core::Request request,
                              const std::function<void(const engine_core::OutputToken&)>& on_token,
                              const StopFunction& stop) {
  const auto [inbox, id] = hand_in(std::move(request));
  Answered answered;
  bool cancelled = false;
  while (!inbox->take(kPatience, answered, on_token)) {
    if (stop && !cancelled && stop()) {
      engine_->engine().cancel(id);
      cancelled = true;
    }
  }
  return answered;
}

void AnswerEngine::hand_over_first() {
  const auto [inbox, on_answer] = std::move(waiting_.front());
  waiting_.pop_front();
  Answered answered;
  while (!inbox->take(std::chrono::hours(1), answered, {})) {
  }
  on_answer(std::move(answered));
}

void AnswerEngine::submit(engine_core::Request request, OnAnswer on_answer) {
  while (std::ssize(waiting_) >= options_.at_once) hand_over_first();
  waiting_.emplace_back(hand_in(std::move(request)).first, std::move(on_answer));
}

void AnswerEngine::finish() {
  while (!waiting_.empty()) hand_over_first();
}

}  // namespace hadal::apps
