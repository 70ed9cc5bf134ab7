// What tests of the scheduler share: a scripted model under a scheduler, recorded answers and what
// they must be. Included by tests only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "engine_core/schedule/scheduler.h"
#include "testing/scripted_model.h"

namespace hadal::testing::scripted {

using Tokens = std::vector<int64_t>;

struct Answer {
  Tokens tokens;
  std::string text;
  std::optional<engine_core::FinishReason> finish;
  std::string matched_stop, error;
  int64_t stop_token = -1;
  friend bool operator==(const Answer&, const Answer&) = default;
};

// All choices of one request; complains about updates after the end.
class Recorder : public engine_core::Sink {
 public:
  void on_update(engine_core::Update update) override {
    Answer& answer = answers[update.choice];
    EXPECT_FALSE(answer.finish) << "an update after the last";
    for (const engine_core::OutputToken& token : update.tokens) {
      answer.tokens.push_back(token.token);
      answer.text += token.text;
    }
    EXPECT_EQ(update.completion_tokens, static_cast<int64_t>(answer.tokens.size()));
    answer.finish = update.finish;
    answer.matched_stop = update.matched_stop;
    answer.error = update.error;
    answer.stop_token = update.stop_token;
    if (update.prompt_scores) scores = *update.prompt_scores;
    cache = update.cache;
    if (update.weights != nullptr) {
      EXPECT_TRUE(weights < 0 || weights == update.weights->number) << "of two versions";
      weights = update.weights->number;
    }
    if (update.finish) ++finished;
    ++updates;
    if (throws) throw std::runtime_error("sink: gone");
  }
  std::map<int64_t, Answer> answers;
  engine_core::CacheReport cache;
  std::vector<engine_core::TokenScore> scores;
  int64_t weights = -1;
  int64_t finished = 0, updates = 0;
  bool throws = false;
};

// What one choice must be, computed without any cache or schedule.
inline Answer expected_answer(const ScriptedModel& model,
                              const engine_core::Request& request,
                              int64_t choice,
                              int64_t max_context) {
  ScriptedFilters filters;
  const std::unique_ptr<engine_core::AnswerFilter> filter = filters.create(request);
  Tokens tokens = request.prompt;
  Answer answer;
  if (request.max_tokens == 0) answer.finish = engine_core::FinishReason::kLength;
  Tokens ends = request.stop_tokens;
  if (!request.ignore_eos) ends.push_back(0);
  while (!answer.finish) {
    const bool early = std::ssize(answer.tokens) < request.min_tokens;
    const std::vector<float> logits = model.reference(tokens);
    const engine_core::Draw draw{
        .sampling = &request.sampling,
        .choice = choice,
        .pos = static_cast<int64_t>(tokens.size()),
        .prompt = {},
        .answer = {},
        .mask = filter->masks({}).front(),
        .avoided = early ? std::span<const int64_t>(ends) : std::span<const int64_t>()};
    const int64_t token = ScriptedSampler::sample(draw, logits).token;
    tokens.push_back(token);
    answer.tokens.push_back(token);
    if (std::ranges::count(ends, token) > 0) {
      if (token != 0) answer.stop_token = token;
      answer.text += filter->finish();
      answer.finish = engine_core::FinishReason::kStop;
      break;
    }
    const engine_core::AnswerFilter::Accepted accepted = filter->accept(token);
    answer.text += accepted.text;
    if (accepted.verdict == engine_core::AnswerFilter::Verdict::kStopString) {
      answer.matched_stop = accepted.matched_stop;
      answer.finish = engine_core::FinishReason::kStopString;
    } else if (accepted.verdict == engine_core::AnswerFilter::Verdict::kComplete) {
      answer.text += filter->finish();
      answer.finish = engine_core::FinishReason::kStop;
    } else if (static_cast<int64_t>(answer.tokens.size()) == request.max_tokens ||
               static_cast<int64_t>(tokens.size()) == max_context) {
      answer.text += filter->finish();
      answer.finish = engine_core::FinishReason::kLength;
    }
  }
  return answer;
}

// What the tokens of a prompt must score.
inline std::vector<engine_core::TokenScore> expected_scores(const ScriptedModel& model,
                                                            const engine_core::Request& request) {
  const ScriptedSampler sampler;
  std::vector<engine_core::TokenScore> scores;
  if (request.prompt_logprobs < 0) return scores;
  for (size_t i = 0; i < request.prompt.size(); ++i) {
    scores.emplace_back();
    if (i < static_cast<size_t>(std::max<int64_t>(request.prompt_logprobs_from, 1))) continue;
    const std::vector<float> logits = model.reference(std::span(request.prompt).first(i));
    scores.back() = sampler.score(logits, request.prompt[i], request.prompt_logprobs);
  }
  return scores;
}

struct Config {
  ScriptedOptions model;
  engine_core::SchedulerOptions scheduler;
  uint64_t drafts_right = 200;  ///< of 256
  int64_t max_context = 200;
  bool store = false;
  engine_core::WindowPolicy policy =
      engine_core::WindowPolicy::kPeriodic;  ///< kFull: with model.whole_windows
};

class World {
 public:
  explicit World(const Config& config)
      : model(config.model),
        drafter(model, config.drafts_right),
        store(config.model.page_tokens, config.policy, model.window_pages()),
        info{.model_name = "scripted",
             .vocab_size = config.model.vocab_size,
             .max_context = config.max_context,
             .max_choices = 4,
             .eos_token = 0},
        scheduler(info,
                  config.scheduler,
                  {.runner = model,
                   .memory = model,
                   .filters = filters,
                   .drafter = &drafter,
                   .store = config.store ? &store : nullptr}) {}

  std::shared_ptr<Recorder> add(const engine_core::Request& request) {
    auto sink = std::make_shared<Recorder>();
    scheduler.add(++last_id, scheduler.prepare(request, sink));
    return sink;
  }
  void run_to_end() {
    for (int64_t i = 0; scheduler.step(); ++i) {
      ASSERT_LT(i, 20000) << "it does not end";
      ASSERT_NO_THROW(scheduler.check_integrity());
    }
  }
  Answer expected(const engine_core::Request& request, int64_t choice = 0) const {
    return expected_answer(model, request, choice,
                           std::min(info.max_context, model.num_pages() * model.page_tokens()));
  }

  ScriptedModel model;
  ScriptedFilters filters;
  ScriptedDrafter drafter;
  ScriptedStore store;
  engine_core::EngineInfo info;
  engine_core::Scheduler scheduler;
  uint64_t last_id = 0;
};

inline engine_core::Request plain(Tokens prompt, int64_t max_tokens) {
  engine_core::Request request;
  request.prompt = std::move(prompt);
  request.max_tokens = max_tokens;
  request.ignore_eos = true;
  request.sampling.temperature = 0;
  return request;
}

inline Tokens counting(int64_t count, int64_t first = 1) {
  Tokens tokens;
  for (int64_t i = 0; i < count; ++i) tokens.push_back((first + i * 3) % 32);
  return tokens;
}

}  // namespace hadal::testing::scripted
