#include "engine_core/disk/write_behind.h"

#include <exception>
#include <utility>

#include "base/log.h"

namespace hadal::engine_core {
namespace {

/// What an item holds in memory, about.
int64_t cost(const WriteItem& item) {
  return static_cast<int64_t>(item.key.size() + item.value.size() + sizeof(WriteItem));
}

}  // namespace

WriteBehind::WriteBehind(Options options, Write write, Idle idle)
    : options_(options),
      write_(std::move(write)),
      idle_(std::move(idle)),
      thread_([this] { run(); }) {}

WriteBehind::~WriteBehind() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_one();
  thread_.join();
}

bool WriteBehind::push(WriteItem item) {
  const int64_t bytes = cost(item);
  {
    const std::lock_guard lock(mutex_);
    if (bytes_ + bytes > options_.queue_bytes) return false;
    bytes_ += bytes;
    ++pushed_;
    queue_.push_back(std::move(item));
  }
  wake_.notify_one();
  return true;
}

bool WriteBehind::has_room(int64_t bytes) const {
  const std::lock_guard lock(mutex_);
  return bytes_ + bytes <= options_.queue_bytes;
}

void WriteBehind::flush() {
  std::unique_lock lock(mutex_);
  const uint64_t target = pushed_;
  written_.wait(lock, [&] { return finished_ >= target; });
}

int64_t WriteBehind::queued_bytes() const {
  const std::lock_guard lock(mutex_);
  return bytes_;
}

void WriteBehind::run() {
  using Clock = std::chrono::steady_clock;
  Clock::time_point next_idle = Clock::now() + options_.idle_every;
  std::unique_lock lock(mutex_);
  while (true) {
    wake_.wait_until(lock, next_idle, [&] { return stopping_ || !queue_.empty(); });
    if (queue_.empty() && stopping_) return;
    std::vector<WriteItem> batch;
    int64_t bytes = 0;
    while (!queue_.empty() && bytes < options_.batch_bytes) {
      bytes += cost(queue_.front());
      batch.push_back(std::move(queue_.front()));
      queue_.pop_front();
    }
    const size_t items = batch.size();
    lock.unlock();
    try {
      if (!batch.empty()) write_(std::move(batch));
      if (Clock::now() >= next_idle) {
        idle_();
        next_idle = Clock::now() + options_.idle_every;
      }
    } catch (const std::exception& error) {
      log::error("disk", "write-behind: ", error.what());
      next_idle = Clock::now() + options_.idle_every;
    }
    lock.lock();
    bytes_ -= bytes;
    finished_ += items;
    if (items > 0) written_.notify_all();
  }
}

}  // namespace hadal::engine_core
