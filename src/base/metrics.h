// Scalars over the steps of a long run, as JSON lines.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace hadal {

/// Appends to `<folder>/metrics.jsonl`, one object a flush: {"step", "tokens", "time", names ...}.
class MetricsWriter {
 public:
  /// Lines of steps beyond `resume_step` are dropped: they belong to work that will be done again.
  MetricsWriter(const std::string& folder, int64_t resume_step);
  ~MetricsWriter();
  MetricsWriter(const MetricsWriter&) = delete;
  MetricsWriter& operator=(const MetricsWriter&) = delete;

  void add(int64_t step, const std::string& name, double value);
  /// Writes what was added since the last flush as one line.
  void flush(int64_t step, int64_t tokens);

 private:
  std::string path_;
  int fd_ = -1;
  std::vector<std::pair<std::string, double>> pending_;
};

}  // namespace hadal
