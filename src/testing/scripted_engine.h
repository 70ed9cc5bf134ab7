// An engine that answers from a script, token by token, for tests of what stands above engines.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "engine_core/answer/answer_text.h"
#include "engine_core/engine.h"
#include "text/tokenizer.h"

namespace hadal::testing {

struct ScriptedEngineOptions {
  std::chrono::microseconds step{0};  ///< pause between steps; each gives every choice one token
  size_t max_requests = 100'000;      ///< running; more find the queue full
  int64_t max_context = 8192;
  bool inline_steps = false;  ///< no thread: submit() answers before it returns
};

/// The script maps a request and a choice to the text of the answer, chat markup included; EOS
/// follows it. Literals of special tokens become them, except behind a byte 0x1A ("\x1a"), which is
/// left out. A text that begins with "!" ends the choice with the error behind it.
class ScriptedEngine final : public engine_core::Engine {
 public:
  using Script = std::function<std::string(const engine_core::Request&, int64_t choice)>;
  ScriptedEngine(const text::Tokenizer& tokenizer,
                 Script script,
                 ScriptedEngineOptions options = {});
  ~ScriptedEngine() override;

  const engine_core::EngineInfo& info() const override { return info_; }
  engine_core::Submitted submit(engine_core::Request request,
                                std::shared_ptr<engine_core::Sink> sink,
                                uint64_t* id) override;
  void cancel(uint64_t id) override;
  engine_core::EngineStats stats() const override;

  /// While held, no step is taken.
  void hold(bool held);
  /// Waits until this many requests were cancelled; false after five seconds.
  bool wait_cancelled(int64_t count) const;
  bool wait_running(int64_t count) const;
  /// The last requests, at least 500, as they came.
  std::vector<engine_core::Request> requests() const;

 private:
  struct ChoiceState {
    std::vector<int32_t> tokens;
    std::string error;
    std::unique_ptr<engine_core::AnswerText> text;
    size_t next = 0;
    bool done = false;
  };
  struct Running {
    engine_core::Request request;
    std::shared_ptr<engine_core::Sink> sink;
    std::vector<ChoiceState> choices;
    std::shared_ptr<const std::vector<engine_core::TokenScore>> scores;
    bool cancelled = false;
  };
  void loop();
  /// One token of every choice; whether the request is over. Under the lock.
  bool step(Running& running);
  engine_core::Update next_token(const Running& running, ChoiceState& choice);

  const text::Tokenizer& tokenizer_;
  const Script script_;
  const ScriptedEngineOptions options_;
  engine_core::EngineInfo info_;
  std::shared_ptr<const engine_core::WeightsVersion> weights_ =
      std::make_shared<engine_core::WeightsVersion>();
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  std::map<uint64_t, Running> running_;
  std::vector<engine_core::Request> seen_;
  engine_core::EngineStats stats_;
  uint64_t next_id_ = 1;
  bool held_ = false, stop_ = false;
  std::thread thread_;
};

}  // namespace hadal::testing
