#include "engine_core/schedule/serving_loop.h"

#include <chrono>
#include <exception>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/memory.h"

namespace hadal::engine_core {
namespace {

/// Without anything to do, until memory is given back that the next step would take again.
constexpr std::chrono::seconds kRest{1};

}  // namespace

ServingLoop::ServingLoop(const EngineInfo& info,
                         const SchedulerOptions& options,
                         const SchedulerParts& parts)
    : info_(info),
      cuts_(parts.cuts),
      filters_(parts.filters),
      max_waiting_(options.max_waiting),
      scheduler_(info, options, parts),
      stats_(scheduler_.stats()),
      thread_([this] { run(); }) {}

ServingLoop::~ServingLoop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = draining_ = true;
  }
  news_.notify_one();
  thread_.join();
}

Submitted ServingLoop::submit(Request request, std::shared_ptr<Sink> sink, uint64_t* id) {
  const auto refused = [&] {
    if (draining_) return Submitted::kStopping;
    const auto arriving = static_cast<int64_t>(submitted_.size());
    return num_waiting_ + arriving >= max_waiting_ ? Submitted::kQueueFull : Submitted::kAccepted;
  };
  {
    // Before the work of preparing; it is asked again after.
    const std::lock_guard lock(mutex_);
    if (const Submitted answer = refused(); answer != Submitted::kAccepted) return answer;
  }
  Scheduler::PreparedPtr prepared =
      scheduler_.prepare(std::move(request), delivery_.keeper(std::move(sink)));
  {
    const std::lock_guard lock(mutex_);
    if (const Submitted answer = refused(); answer != Submitted::kAccepted) return answer;
    *id = next_id_++;
    submitted_.emplace_back(*id, std::move(prepared));
    is_idle_ = false;
  }
  news_.notify_one();
  return Submitted::kAccepted;
}

void ServingLoop::cancel(uint64_t id) {
  {
    const std::lock_guard lock(mutex_);
    cancelled_.push_back(id);
  }
  news_.notify_one();
}

EngineStats ServingLoop::stats() const {
  const int64_t grammars = filters_.kept_bytes();
  const std::lock_guard lock(mutex_);
  EngineStats stats = stats_;
  stats.grammar_bytes = grammars;
  stats.grammar_bytes_most = filters_.most_kept_bytes();
  stats.workspace_bytes = workspace_bytes_;
  stats.waiting += static_cast<int64_t>(submitted_.size());
  return stats;
}

void ServingLoop::update_weights(const WeightsUpdate& update) {
  PendingUpdate pending{.update = update, .done = {}};
  std::future<void> done = pending.done.get_future();
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) throw Error("engine: it stops");
    updates_.push_back(&pending);
  }
  news_.notify_one();
  done.get();
}

// Once nobody is left who began with the old ones.
void ServingLoop::change_weights() {
  PendingUpdate* pending = nullptr;
  {
    const std::lock_guard lock(mutex_);
    if (updates_.empty()) return;
    pending = updates_.front();
  }
  scheduler_.hold_waiting();
  if (!scheduler_.drained()) return;
  std::exception_ptr error;
  try {
    scheduler_.update_weights(pending->update);
  } catch (...) {
    error = std::current_exception();
  }
  {
    const std::lock_guard lock(mutex_);
    updates_.pop_front();
  }
  // Who waits goes away with `pending` as soon as it is told.
  std::promise<void> done = std::move(pending->done);
  error ? done.set_exception(error) : done.set_value();
}

void ServingLoop::refuse_updates() {
  const auto refused = [this] {
    const std::lock_guard lock(mutex_);
    return std::exchange(updates_, {});
  }();
  for (PendingUpdate* pending : refused) {
    std::promise<void> done = std::move(pending->done);
    done.set_exception(std::make_exception_ptr(Error("engine: it stops")));
  }
}

std::vector<int64_t> ServingLoop::as_written(std::vector<int64_t> prompt) const {
  if (cuts_ == nullptr) return prompt;
  std::vector<int64_t> written = cuts_->recall(prompt);
  // Other cuts may be longer: not so long that a prompt that fits does no longer.
  return std::ssize(written) < info_.max_context ? written : prompt;
}

void ServingLoop::drain() {
  {
    std::unique_lock lock(mutex_);
    draining_ = true;
    idle_.wait(lock, [this] { return is_idle_; });
  }
  delivery_.wait();
}

bool ServingLoop::integrity_lost() const {
  const std::lock_guard lock(mutex_);
  return integrity_lost_;
}

// Moves submissions and cancellations into the scheduler. False: stop.
bool ServingLoop::take_news(std::unique_lock<std::mutex>& lock) {
  auto submitted = std::exchange(submitted_, {});
  auto cancelled = std::exchange(cancelled_, {});
  const bool stopping = stopping_;
  num_waiting_ += static_cast<int64_t>(submitted.size());
  lock.unlock();
  for (auto& [id, prepared] : submitted) scheduler_.add(id, std::move(prepared));
  for (const uint64_t id : cancelled) scheduler_.cancel(id);
  lock.lock();
  return !stopping;
}

void ServingLoop::check_when_idle() {
  try {
    scheduler_.check_integrity();
  } catch (const std::exception& error) {
    log::error("engine", "integrity: ", error.what());
    const std::lock_guard lock(mutex_);
    integrity_lost_ = true;
  }
}

void ServingLoop::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    const bool going_on = take_news(lock);
    lock.unlock();
    if (!going_on) {
      scheduler_.cancel_all();
      delivery_.hand_over();
      refuse_updates();
      check_when_idle();
      lock.lock();
      stats_ = scheduler_.stats();
      is_idle_ = true;
      idle_.notify_all();
      return;
    }
    bool busy = false;
    try {
      change_weights();
      busy = scheduler_.step();
    } catch (const std::exception& error) {
      // A mistake of the scheduler itself: nobody's answer can be trusted to go on.
      log::error("engine", "the scheduler failed: ", error.what());
      scheduler_.fail_all(error.what());
    }
    {
      // Whoever has an answer finds it counted.
      const std::lock_guard counting(mutex_);
      stats_ = scheduler_.stats();
      num_waiting_ = scheduler_.num_waiting_requests();
    }
    delivery_.hand_over();
    if (!busy) check_when_idle();
    lock.lock();
    const auto has_news = [this] {
      return !submitted_.empty() || !cancelled_.empty() || !updates_.empty() || stopping_;
    };
    if (busy || has_news()) continue;
    is_idle_ = true;
    idle_.notify_all();
    if (news_.wait_for(lock, kRest, has_news)) continue;
    lock.unlock();
    scheduler_.rest();
    give_back_freed_memory();
    lock.lock();
    news_.wait(lock, has_news);
  }
}

}  // namespace hadal::engine_core
