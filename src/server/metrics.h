// Counters of the server, written as Prometheus reads them. Thread-safe.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>

#include "engine_core/engine.h"
#include "server/http.h"

namespace hadal::server {

class Counter {
 public:
  void add(int64_t count = 1) { value_.fetch_add(count, std::memory_order_relaxed); }
  int64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> value_{0};
};

/// Durations in buckets from 5 ms to 10 min.
class Histogram {
 public:
  static constexpr std::array<double, 14> kBounds = {0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
                                                     1.0,   2.5,  5.0,   10.0, 30., 120., 600.};
  void observe(std::chrono::steady_clock::duration duration);
  void write(std::string& out, std::string_view name, std::string_view help) const;

 private:
  std::array<Counter, kBounds.size() + 1> buckets_;
  Counter micros_;
};

struct ApiMetrics {
  Counter finished, failed, cancelled, queue_full, malformed, irregular, open_reasoning, over_limit,
      unauthorised;
  Histogram first_token, duration;

  void count_response(std::string_view route, int status);
  /// All of it as text/plain; version=0.0.4.
  std::string text(const engine_core::EngineStats& engine, const HttpStats& http) const;

 private:
  mutable std::mutex mutex_;
  std::map<std::pair<std::string, int>, int64_t> responses_;
};

}  // namespace hadal::server
