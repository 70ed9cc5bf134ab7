#include "base/progress.h"

#include <cmath>
#include <cstdio>
#include <unistd.h>

#include <fmt/format.h>

namespace hadal {

std::string short_number(double value) {
  const char* unit = "";
  for (const char* next : {" K", " M", " G", " T"}) {
    if (std::abs(value) < 999.5) break;
    value /= 1000.0;
    unit = next;
  }
  return fmt::format("{:.3g}{}", value, unit);
}

std::string short_duration(double seconds) {
  const auto whole = static_cast<int64_t>(std::llround(std::max(0.0, seconds)));
  const int64_t hours = whole / 3600, minutes = whole / 60 % 60, rest = whole % 60;
  return hours > 0 ? fmt::format("{}:{:02}:{:02}", hours, minutes, rest)
                   : fmt::format("{}:{:02}", minutes, rest);
}

Progress::Progress(std::string label, int64_t total, std::string unit)
    : label_(std::move(label)),
      unit_(std::move(unit)),
      total_(total),
      terminal_(isatty(STDERR_FILENO) != 0) {}

Progress::~Progress() { finish(); }

void Progress::update(int64_t done, const std::string& suffix) {
  const Clock::time_point now = Clock::now();
  if (first_ < 0) {
    first_ = done;
    start_ = now;
    last_draw_ = now - std::chrono::hours(1);
  }
  done_ = done;
  suffix_ = suffix;
  if (now - last_draw_ < (terminal_ ? std::chrono::milliseconds(200) : std::chrono::seconds(5))) {
    drawn_ = false;
    return;
  }
  last_draw_ = now;
  draw();
}

void Progress::finish() {
  if (finished_ || first_ < 0) return;
  finished_ = true;
  if (!drawn_) draw();
  if (terminal_) std::fputc('\n', stderr);
}

void Progress::draw() {
  drawn_ = true;
  const double seconds = std::chrono::duration<double>(Clock::now() - start_).count();
  const double rate = seconds > 0.0 ? static_cast<double>(done_ - first_) / seconds : 0.0;
  std::string line = label_;
  if (terminal_ && total_ > 0) {
    constexpr int64_t kWidth = 24;
    const int64_t filled = std::min(kWidth, kWidth * done_ / total_);
    line += fmt::format(" [{:#<{}}{:.<{}}]", "", filled, "", kWidth - filled);
  }
  line += fmt::format(" {}", short_number(static_cast<double>(done_)));
  if (total_ > 0) {
    line += fmt::format(" of {} {} ({:.1f} %)", short_number(static_cast<double>(total_)), unit_,
                        100.0 * static_cast<double>(done_) / static_cast<double>(total_));
  } else {
    line += fmt::format(" {}", unit_);
  }
  if (rate > 0.0) {
    line += fmt::format(", {} {}/s", short_number(rate), unit_);
    if (total_ > done_) {
      line += fmt::format(", {} left", short_duration(static_cast<double>(total_ - done_) / rate));
    }
  }
  if (!suffix_.empty()) line += fmt::format(", {}", suffix_);
  // \33[K clears what a longer line before left behind.
  std::fputs(terminal_ ? fmt::format("\r{}\33[K", line).c_str() : fmt::format("{}\n", line).c_str(),
             stderr);
  std::fflush(stderr);
}

}  // namespace hadal
