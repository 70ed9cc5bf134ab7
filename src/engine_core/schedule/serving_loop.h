// The engine: a scheduler on a thread of its own. Anyone may submit and cancel; the thread takes
// both in between steps, so that either takes effect within one step. Updates reach their sinks on
// another thread.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "engine_core/engine.h"
#include "engine_core/schedule/delivery.h"
#include "engine_core/schedule/scheduler.h"

namespace hadal::engine_core {

class ServingLoop : public Engine {
 public:
  /// Starts the thread; `parts` outlive the loop and belong to its thread.
  ServingLoop(const EngineInfo& info, const SchedulerOptions& options, const SchedulerParts& parts);
  /// Cancels what is left and delivers all updates. Not from within an update.
  ~ServingLoop() override;

  const EngineInfo& info() const override { return info_; }
  Submitted submit(Request request, std::shared_ptr<Sink> sink, uint64_t* id) override;
  void cancel(uint64_t id) override;
  EngineStats stats() const override;
  void update_weights(const WeightsUpdate& update) override;
  std::vector<int64_t> as_written(std::vector<int64_t> prompt) const override;

  /// No more requests; returns when the accepted ones have ended and their sinks know it. Not from
  /// within an update.
  void drain();
  /// What the process takes at rest beside weights and caches, as stats() tell it from here on.
  void state_workspace(int64_t bytes) { workspace_bytes_ = bytes; }
  /// Whether pools, tree and sequences ever disagreed when the loop was idle (it was logged).
  bool integrity_lost() const;

 private:
  void run();
  bool take_news(std::unique_lock<std::mutex>& lock);
  void change_weights();
  void refuse_updates();
  void check_when_idle();

  const EngineInfo info_;
  const AnswerCuts* const cuts_;
  const AnswerFilters& filters_;
  const int64_t max_waiting_;
  Delivery delivery_;
  Scheduler scheduler_;  ///< the thread's, except prepare()

  mutable std::mutex mutex_;
  std::condition_variable news_, idle_;
  std::vector<std::pair<uint64_t, Scheduler::PreparedPtr>> submitted_;
  std::vector<uint64_t> cancelled_;
  struct PendingUpdate {
    const WeightsUpdate& update;
    std::promise<void> done;
  };
  std::deque<PendingUpdate*> updates_;  ///< their callers wait
  EngineStats stats_;
  std::atomic<int64_t> workspace_bytes_{0};
  uint64_t next_id_ = 1;
  int64_t num_waiting_ = 0;  ///< in the scheduler
  bool draining_ = false, stopping_ = false, is_idle_ = true, integrity_lost_ = false;

  std::thread thread_;
};

}  // namespace hadal::engine_core
