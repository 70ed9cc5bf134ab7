// A pool of threads for the CPU kernels.
//
// Work is cut into numbered tasks whose results do not depend on who runs them: a kernel gives each
// output to one task as a whole, so the number of threads never changes a bit. A region has a few
// more tasks than threads, and whoever is free takes the next one, so that a thread that is held up
// delays little. Idle workers spin for a moment before they sleep, because a decode step starts
// hundreds of short regions; while they do, their processor is anybody's who asks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <type_traits>

namespace hadal {

/// Threads that parallel_for uses, the caller included. Default: the processors this process may
/// use.
int num_threads();
/// Changes it; 1 <= count <= 1024. Not while a parallel_for is running.
void set_num_threads(int count);

namespace detail {
void parallel_run(int64_t num_tasks, void (*task)(void*, int64_t), void* context);
}  // namespace detail

/// Runs body(begin, end) over [0, count) cut into contiguous ranges of at least `grain` items;
/// blocks until all are done. Runs inline when one range is enough or when called from inside
/// another parallel_for. The first exception thrown by a body is rethrown here.
template <typename Body>
void parallel_for(int64_t count, int64_t grain, Body&& body) {
  if (count <= 0) return;
  const int64_t max_ranges = (count + grain - 1) / (grain > 0 ? grain : 1);
  constexpr int64_t kRangesPerThread = 4;
  const int64_t threads = num_threads();
  const int64_t most = threads > 1 ? threads * kRangesPerThread : 1;
  const int64_t num_ranges = max_ranges < most ? max_ranges : most;
  if (num_ranges <= 1) {
    body(int64_t{0}, count);
    return;
  }
  struct Context {
    std::remove_reference_t<Body>* body;
    int64_t count, num_ranges;
  } context{&body, count, num_ranges};
  detail::parallel_run(
      num_ranges,
      [](void* raw, int64_t index) {
        auto& c = *static_cast<Context*>(raw);
        (*c.body)(c.count * index / c.num_ranges, c.count * (index + 1) / c.num_ranges);
      },
      &context);
}

}  // namespace hadal
