// Processor time of one thread.
#pragma once

#include <chrono>
#include <ctime>

namespace hadal {

/// What the calling thread has used so far; about a quarter of a microsecond to ask.
inline std::chrono::nanoseconds thread_time() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
}

}  // namespace hadal
