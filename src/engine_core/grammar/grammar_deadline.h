// Until when a grammar is compiled: internal to grammar.cpp.
//
// xgrammar asks often (cmake/xgrammar/compile_time.h), so that a thread whose callers have all
// given up does not go on for as long as the grammar takes.
#pragma once

#include <atomic>
#include <chrono>
#include <string>
#include <utility>

namespace hadal::engine_core {

/// Of one compilation; whoever waits for it may put it off. Safe from many threads.
class GrammarDeadline {
 public:
  using Time = std::chrono::steady_clock::time_point;

  /// `message`: of the error behind it.
  GrammarDeadline(Time time, std::string message)
      : ticks_(time.time_since_epoch().count()), message_(std::move(message)) {}
  /// Not before `time`.
  void extend(Time time);
  bool passed() const;
  const std::string& message() const { return message_; }

 private:
  std::atomic<Time::rep> ticks_;
  std::string message_;
};

/// While it lives, what this thread compiles ends with an InputError once the deadline has passed.
class GrammarDeadlineScope {
 public:
  explicit GrammarDeadlineScope(const GrammarDeadline& deadline);
  ~GrammarDeadlineScope();
  GrammarDeadlineScope(const GrammarDeadlineScope&) = delete;
  GrammarDeadlineScope& operator=(const GrammarDeadlineScope&) = delete;
};

}  // namespace hadal::engine_core
