// What a load test measured: the table, the JSON document and the charts.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/percentiles.h"
#include "load/answer.h"

namespace hadal {
class JsonWriter;
}

namespace hadal::load {

/// Gathers outcomes. Slow readers count as requests, tokens and errors but not in the latencies,
/// which would be their own.
class LoadReport {
 public:
  void add(const Outcome& outcome);
  /// All outcomes are in: sorts what was measured.
  void finish(double seconds, int64_t sent);

  int64_t answered() const { return done_; }
  int64_t failed() const;

  void print(const std::string& title) const;
  /// Members of an object that is open.
  void write_json(JsonWriter& out) const;
  /// Two charts: time to first token, and gaps, over the share of requests or gaps.
  std::string draw() const;

 private:
  struct ErrorKind {
    int64_t count = 0;
    std::string example;
  };

  int64_t sent_ = 0, done_ = 0, cancelled_ = 0, slow_ = 0;
  int64_t answer_tokens_ = 0, prompt_tokens_ = 0, cached_tokens_ = 0;
  bool prompt_known_ = false, cached_known_ = false;
  double seconds_ = 0, latest_ = 0;
  std::map<std::string, ErrorKind> errors_;
  std::vector<double> first_values_, gap_values_, whole_values_, late_values_;
  Percentiles first_, gap_, whole_, late_;  ///< seconds
};

}  // namespace hadal::load
