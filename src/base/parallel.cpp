#include "base/parallel.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <sched.h>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"

namespace hadal {
namespace {

thread_local bool inside_parallel_region = false;

void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int available_processors() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    const int count = CPU_COUNT(&set);
    if (count > 0) return count;
  }
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

/// Task i of a region goes to thread i: thread 0 is the caller, thread i > 0 the worker i - 1.
class ThreadPool {
 public:
  ~ThreadPool() { stop(); }

  void resize(int num_workers) {
    if (static_cast<int>(workers_.size()) == num_workers) return;
    stop();
    stopping_ = false;
    for (int index = 0; index < num_workers; ++index) {
      workers_.emplace_back([this, index, seen = generation_.load()] { work(index, seen); });
    }
  }

  void run(int64_t num_tasks, void (*task)(void*, int64_t), void* context) {
    task_ = task;
    context_ = context;
    num_tasks_ = num_tasks;
    pending_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
    {
      // The lock pairs with the sleepers' check, so that none misses the new generation.
      std::lock_guard<std::mutex> lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleepers_.load(std::memory_order_relaxed) > 0) wake_.notify_all();
    execute(0);
    while (pending_.load(std::memory_order_acquire) > 0) cpu_pause();
    if (error_) {
      std::exception_ptr error = std::exchange(error_, nullptr);
      std::rethrow_exception(error);
    }
  }

  int num_workers() const { return static_cast<int>(workers_.size()); }

 private:
  void execute(int64_t index) {
    if (index >= num_tasks_) return;
    inside_parallel_region = true;
    try {
      task_(context_, index);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside_parallel_region = false;
  }

  void work(int index, uint64_t seen) {
    // About 100 us of spinning: longer than the gaps between the regions of one decode step.
    constexpr int kSpins = 4000;
    for (;;) {
      int spins = 0;
      while (generation_.load(std::memory_order_acquire) == seen && spins < kSpins) {
        cpu_pause();
        ++spins;
      }
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
        sleepers_.fetch_sub(1);
      }
      ++seen;
      if (stopping_) return;
      execute(index + 1);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> pending_{0};
  std::atomic<int> sleepers_{0};
  bool stopping_ = false;
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  int64_t num_tasks_ = 0;
  std::exception_ptr error_;
};

std::mutex pool_mutex;  // one region at a time; concurrent callers take turns
std::atomic<int> thread_count{0};

ThreadPool& pool() {
  static ThreadPool instance;
  return instance;
}

}  // namespace

int num_threads() {
  if (inside_parallel_region) return 1;
  const int count = thread_count.load(std::memory_order_relaxed);
  return count > 0 ? count : available_processors();
}

void set_num_threads(int count) {
  HADAL_INPUT_CHECK(count >= 1 && count <= 1024, "threads: expected 1 to 1024, found ", count);
  std::lock_guard<std::mutex> lock(pool_mutex);
  thread_count.store(count);
  pool().resize(count - 1);
}

void detail::parallel_run(int64_t num_tasks, void (*task)(void*, int64_t), void* context) {
  std::lock_guard<std::mutex> lock(pool_mutex);
  ThreadPool& threads = pool();
  if (thread_count.load() == 0) thread_count.store(available_processors());
  threads.resize(thread_count.load() - 1);
  HADAL_CHECK(num_tasks <= threads.num_workers() + 1, "parallel_run: ", num_tasks, " tasks for ",
              threads.num_workers() + 1, " threads");
  threads.run(num_tasks, task, context);
}

}  // namespace hadal
