// The engine as commands use it: requests in, answers out, on the command's own thread.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "apps/loaded_model.h"
#include "engine_core/request.h"

namespace hadal::engine {
class LocalEngine;
}

namespace hadal::apps {

/// What became of a request.
struct Answered {
  std::string text;             ///< bytes, whole characters
  std::vector<int64_t> tokens;  ///< with the EOS that ended it
  Finish finish = Finish::kStop;
  engine_core::CacheReport cache;
  std::shared_ptr<const std::vector<engine_core::TokenScore>> prompt_scores;  ///< where asked for
};

struct AnswerEngineOptions {
  int64_t at_once = 1;           ///< answers that are computed together
  int64_t max_drafts = 0;        ///< no bit depends on it
  int64_t step_tokens = 1024;    ///< rows of a step of prompts alone
  at::Device device = at::kCPU;  ///< where the model lies
  int64_t context = 0;           ///< of prompt and answer, at most; 0: what the model takes
};

/// Its memory is taken as it is used: any context that the model takes has its room.
class AnswerEngine {
 public:
  /// `loaded` must outlive it.
  explicit AnswerEngine(const LoadedModel& loaded, const AnswerEngineOptions& options = {});
  ~AnswerEngine();

  /// Tokens that may follow a prompt. Errors: InputError, beginning with `origin`, where none may
  /// or the prompt is empty.
  int64_t room_behind(int64_t prompt_tokens, const std::string& origin) const;

  /// One answer as it comes: `on_token` gets each token, `stop` is asked many times a second and
  /// ends it. Errors: Error where the engine fails, InputError for a request that cannot be.
  Answered answer(engine_core::Request request,
                  const std::function<void(const engine_core::OutputToken&)>& on_token,
                  const StopFunction& stop);

  using OnAnswer = std::function<void(Answered)>;
  /// Hands a request in; waits while `at_once` others are in work. Answers are handed over in the
  /// order of their requests, from this call or finish().
  void submit(engine_core::Request request, OnAnswer on_answer);
  /// All answers that are still out.
  void finish();

 private:
  class Inbox;
  std::pair<std::shared_ptr<Inbox>, uint64_t> hand_in(engine_core::Request request);
  void hand_over_first();

  AnswerEngineOptions options_;
  std::unique_ptr<engine::LocalEngine> engine_;
  std::deque<std::pair<std::shared_ptr<Inbox>, OnAnswer>> waiting_;
};

}  // namespace hadal::apps
