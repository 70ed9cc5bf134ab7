// Ctrl-C as a request that loops look at, instead of the end of the program.
#pragma once

#include <csignal>

namespace hadal::apps {

/// From the first one on, SIGINT only sets the flag, and interrupts a blocking read; to the end of
/// the program, so that an impatient second Ctrl-C does not spoil its exit code.
class InterruptFlag {
 public:
  InterruptFlag();
  InterruptFlag(const InterruptFlag&) = delete;
  InterruptFlag& operator=(const InterruptFlag&) = delete;

  bool raised() const;
  void clear();
};

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
