// Scalars over the steps of a long run, as JSON lines and as a TensorBoard event file.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace hadal {

/// Appends to `<folder>/metrics.jsonl`, one object a flush: {"step", "tokens", "time", names ...},
/// and the same scalars and `tokens` to `<folder>/events.out.tfevents.*`. Killed at any moment,
/// both hold everything up to the last flush.
class MetricsWriter {
 public:
  /// Lines and events of steps beyond `resume_step` are dropped: they belong to work that will be
  /// done again. Every writer begins an event file of its own, as TensorBoard expects; the first
  /// one of a folder says what the lines say already.
  MetricsWriter(const std::string& folder, int64_t resume_step);
  ~MetricsWriter();
  MetricsWriter(const MetricsWriter&) = delete;
  MetricsWriter& operator=(const MetricsWriter&) = delete;

  void add(int64_t step, const std::string& name, double value);
  /// Writes what was added since the last flush as one line and one event.
  void flush(int64_t step, int64_t tokens);

 private:
  struct File {
    std::string path;
    int fd = -1;
  };
  static void append(const File& file, const std::string& bytes);

  File lines_, events_;
  std::vector<std::pair<std::string, double>> pending_;
};

}  // namespace hadal
