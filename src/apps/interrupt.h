// Ctrl-C as a request that loops look at, instead of the end of the program.
#pragma once

namespace hadal::apps {

/// While one lives, SIGINT only sets the flag, and interrupts a blocking read. One at a time.
class InterruptFlag {
 public:
  InterruptFlag();
  ~InterruptFlag();
  InterruptFlag(const InterruptFlag&) = delete;
  InterruptFlag& operator=(const InterruptFlag&) = delete;

  bool raised() const;
  void clear();
};

}  // namespace hadal::apps
