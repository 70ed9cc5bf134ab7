// Progress of long work, on standard error: a bar with rate and remaining time on a terminal, a
// plain line every few seconds elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace hadal {

class Progress {
 public:
  /// `total` units of work; 0 when unknown.
  Progress(std::string label, int64_t total, std::string unit);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// `done` units are done; `suffix` is shown behind the numbers. The first call sets the point
  /// that the rate is counted from. Redraws at most a few times a second.
  void update(int64_t done, const std::string& suffix = "");
  /// Shows the last state and ends the line.
  void finish();

 private:
  using Clock = std::chrono::steady_clock;
  void draw();

  std::string label_, unit_, suffix_;
  int64_t total_, first_ = -1, done_ = 0;
  bool terminal_, drawn_ = false, finished_ = false;
  Clock::time_point start_, last_draw_;
};

/// "12.3 K", "4.56 M": three significant digits.
std::string short_number(double value);
/// "1:02:03" or "2:03".
std::string short_duration(double seconds);

}  // namespace hadal
