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

/// One look of somebody who waits. Now and then the processor is offered to whoever else wants it:
/// a thread that holds what is waited for may be among them. Where nobody does, that is soon over.
void spin(unsigned count) {
  constexpr unsigned kLooksAnOffer = 32;
  count % kLooksAnOffer == kLooksAnOffer - 1 ? static_cast<void>(sched_yield()) : cpu_pause();
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

/// A region is a count of tasks that have not been taken yet; the caller and every worker that is
/// awake take one after the other. So nobody waits for a worker that the system has put aside
/// before it took a task.
class ThreadPool {
 public:
  ~ThreadPool() { stop(); }

  void resize(int num_workers) {
    if (static_cast<int>(workers_.size()) == num_workers) return;
    stop();
    stopping_ = false;
    for (int index = 0; index < num_workers; ++index) workers_.emplace_back([this] { work(); });
  }

  void run(int64_t num_tasks, void (*task)(void*, int64_t), void* context) {
    task_ = task;
    context_ = context;
    done_.store(0, std::memory_order_relaxed);
    // Sequentially consistent, like the sleepers' check: one of the two sees the other.
    region_.store(((region_.load() >> 32) + 1) << 32 | static_cast<uint64_t>(num_tasks));
    if (sleepers_.load() > 0) {
      { const std::lock_guard<std::mutex> lock(mutex_); }
      wake_.notify_all();
    }
    while (take_one()) {
    }
    for (unsigned spins = 0; done_.load(std::memory_order_acquire) < num_tasks; ++spins)
      spin(spins);
    if (error_) {
      std::exception_ptr error = std::exchange(error_, nullptr);
      std::rethrow_exception(error);
    }
  }

 private:
  /// About 1 ms: longer than any gap between the regions of one decode step, so that none of them
  /// has to wake a sleeper.
  static constexpr unsigned kSpins = 20000;

  static int64_t tasks_left(uint64_t region) { return static_cast<int64_t>(region & 0xffffffffu); }

  /// Runs one task of the current region; false when none is left. Everything about the region is
  /// read after a task was taken, which keeps the region alive.
  bool take_one() {
    uint64_t region = region_.load(std::memory_order_acquire);
    do {
      if (tasks_left(region) == 0) return false;
    } while (!region_.compare_exchange_weak(region, region - 1, std::memory_order_acq_rel));
    inside_parallel_region = true;
    try {
      task_(context_, tasks_left(region) - 1);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside_parallel_region = false;
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void work() {
    for (unsigned spins = 0;;) {
      if (take_one()) {
        spins = 0;
        continue;
      }
      if (stopping_.load(std::memory_order_relaxed)) return;
      if (++spins < kSpins) {
        spin(spins);
        continue;
      }
      std::unique_lock<std::mutex> lock(mutex_);
      sleepers_.fetch_add(1);
      wake_.wait(lock, [&] { return tasks_left(region_.load()) > 0 || stopping_; });
      sleepers_.fetch_sub(1);
      spins = 0;
    }
  }

  void stop() {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> region_{0};  ///< its number, and in the low 32 bits the tasks left to take
  std::atomic<int64_t> done_{0};
  std::atomic<int> sleepers_{0};
  std::atomic<bool> stopping_{false};
  void (*task_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
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
  threads.run(num_tasks, task, context);
}

}  // namespace hadal
