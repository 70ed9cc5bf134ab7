// Ctrl-C as a request that loops look at, instead of the end of the program.
#pragma once

#include <csignal>

namespace hadal::apps {

/// From the first one on, SIGINT only sets the flag, and ends wait_for_input; to the end of the
/// program, so that an impatient second Ctrl-C does not spoil its exit code. One at a time.
class InterruptFlag {
 public:
  InterruptFlag();
  InterruptFlag(const InterruptFlag&) = delete;
  InterruptFlag& operator=(const InterruptFlag&) = delete;

  bool raised() const;
  void clear();
};

/// Waits until `file` has bytes or is at its end: true; false when the flag is raised, be it before
/// the call, within it, or by a signal that another thread took. A read of its own would miss a
/// signal that comes just before it.
bool wait_for_input(int file);

/// Threads started while it lives leave SIGINT to the others.
class InterruptMask {
 public:
  InterruptMask();
  ~InterruptMask();
  InterruptMask(const InterruptMask&) = delete;
  InterruptMask& operator=(const InterruptMask&) = delete;

 private:
  sigset_t before_;
};

}  // namespace hadal::apps
